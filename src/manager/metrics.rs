//! The manager as OpenMetrics text (version 1.0 of the specification), for Prometheus and its kin.
//!
//! Architecture invariant: a scrape asks no VM anything. Figures of a VM are those of its last health sample.

use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};

use super::Manager;
use crate::model::{EventKind, HealthStatus, IsolationType, VmState};
use crate::vm::{Health, MicroVm};

type Labels = Vec<(&'static str, String)>;
type Gauges = Family<Labels, Gauge<f64, AtomicU64>>;
type Counters = Family<Labels, Counter<f64, AtomicU64>>;

/// One exposition in the making.
struct Page(Registry);

impl Page {
    fn gauge(&mut self, name: &str, unit: Option<Unit>, help: &str, values: impl IntoIterator<Item = (Labels, f64)>) {
        let family = Gauges::default();
        for (labels, value) in values {
            family.get_or_create(&labels).set(value);
        }
        match unit {
            Some(unit) => self.0.register_with_unit(name, help, unit, family),
            None => self.0.register(name, help, family),
        }
    }

    fn counter(&mut self, name: &str, unit: Option<Unit>, help: &str, values: impl IntoIterator<Item = (Labels, f64)>) {
        let family = Counters::default();
        for (labels, value) in values {
            family.get_or_create(&labels).inc_by(value);
        }
        match unit {
            Some(unit) => self.0.register_with_unit(name, help, unit, family),
            None => self.0.register(name, help, family),
        }
    }
}

fn label(name: &'static str, value: impl Into<String>) -> Labels {
    vec![(name, value.into())]
}

/// All there is to say about `manager`, ending with `# EOF`.
pub fn render(manager: &Manager) -> String {
    let mut page = Page(Registry::with_prefix("microvm"));
    let vms = manager.all();
    totals(&mut page, manager, &vms);
    let looks: Vec<(String, Health)> =
        vms.iter().filter_map(|vm| Some((vm.id().to_string(), vm.last_health()?))).collect();
    of_each(&mut page, &looks);
    let mut text = String::new();
    // Writing to a string does not fail.
    if let Err(error) = encode(&mut text, &page.0) {
        log::error!("the metrics could not be written: {error}");
    }
    text
}

fn totals(page: &mut Page, manager: &Manager, vms: &[std::sync::Arc<MicroVm>]) {
    let usage = manager.usage();
    let mut by: Vec<(Labels, f64)> = Vec::new();
    for isolation_type in IsolationType::ALL {
        for state in VmState::ALL.into_iter().filter(|state| *state != VmState::Destroyed) {
            let count = vms.iter().filter(|vm| vm.spec().isolation_type == *isolation_type && vm.state() == state);
            let labels = vec![("isolation_type", isolation_type.to_string()), ("state", state.to_string())];
            by.push((labels, count.count() as f64));
        }
    }
    page.gauge("vms", None, "VMs, by isolation type and state", by);
    let of_quota =
        |used: u64, left: u64| [(label("share", "allocated"), used as f64), (label("share", "available"), left as f64)];
    page.gauge("quota_vcpus", None, "vCPUs of the quota", of_quota(usage.allocated.vcpus, usage.available.vcpus));
    let mib = (usage.allocated.memory_mb << 20, usage.available.memory_mb << 20);
    page.gauge("quota_memory", Some(Unit::Bytes), "Memory of the quota", of_quota(mib.0, mib.1));
    let pools = usage.pool.iter().enumerate();
    let ready = pools.map(|(index, pool)| (label("shelf", index.to_string()), pool.ready as f64));
    page.gauge("pool_ready", None, "Warm VMs", ready);
    let (_, bytes) = usage.templates;
    page.gauge("templates", Some(Unit::Bytes), "Templates on disk", [(Labels::new(), bytes as f64)]);
    let (counts, dropped) = manager.events().counts();
    let counts = EventKind::NAMES.iter().zip(counts).map(|(kind, count)| (label("kind", *kind), count as f64));
    page.counter("events", None, "Events, by kind", counts);
    let dropped = [(Labels::new(), dropped as f64)];
    page.counter("events_dropped", None, "Events dropped from the full queue of a subscriber", dropped);
}

fn of_each(page: &mut Page, looks: &[(String, Health)]) {
    let each = |value: fn(&Health) -> Option<f64>| {
        let of = move |(vm_id, health): &(String, Health)| Some((label("vm_id", vm_id.clone()), value(health)?));
        looks.iter().filter_map(of).collect::<Vec<_>>()
    };
    let status = looks.iter().flat_map(|(vm_id, health)| {
        HealthStatus::ALL.map(|status| {
            let labels = vec![("vm_id", vm_id.clone()), ("status", status.as_str().to_owned())];
            (labels, f64::from(u8::from(health.report.status == status)))
        })
    });
    page.gauge("vm_health", None, "1 for the status that the VM has", status);
    let missed = each(|health| Some(f64::from(health.report.missed)));
    page.gauge("vm_heartbeats_missed", None, "Looks in a row without a sign of life", missed);
    let round_trip = each(|health| health.round_trip_s);
    page.gauge("vm_heartbeat", Some(Unit::Seconds), "How long the agent took to answer", round_trip);
    page.gauge("vm_uptime", Some(Unit::Seconds), "Time since the start", each(|health| Some(health.uptime_seconds)));
    page.counter("vm_cpu", Some(Unit::Seconds), "CPU time of the VMM", each(|health| Some(health.cpu_s)));
    let resident = each(|health| Some((health.memory_usage_mb << 20) as f64));
    page.gauge("vm_resident_memory", Some(Unit::Bytes), "Resident memory of the VMM", resident);
    let charged = each(|health| health.group.memory_bytes.map(|bytes| bytes as f64));
    page.gauge("vm_group_memory", Some(Unit::Bytes), "Memory charged to the VM's control group", charged);
    let throttled = each(|health| health.group.throttled_us.map(|us| us as f64 / 1e6));
    page.counter("vm_throttled", Some(Unit::Seconds), "Time held back at the CPU quota", throttled);
    page.counter("vm_disk_io", Some(Unit::Bytes), "Bytes its drives moved", each(|h| Some(h.disk_io_bytes as f64)));
    let received = each(|health| Some(health.network_rx_bytes as f64));
    page.counter("vm_network_received", Some(Unit::Bytes), "Bytes the VM received", received);
    let sent = each(|health| Some(health.network_tx_bytes as f64));
    page.counter("vm_network_sent", Some(Unit::Bytes), "Bytes the VM sent", sent);
    let total = each(|health| Some(health.guest.as_ref()?.memory_total_bytes as f64));
    page.gauge("vm_guest_memory", Some(Unit::Bytes), "Memory of the guest", total);
    let available = each(|health| Some(health.guest.as_ref()?.memory_available_bytes as f64));
    page.gauge("vm_guest_memory_available", Some(Unit::Bytes), "Memory that the guest has left", available);
    let disk_free = each(|health| Some(health.guest.as_ref()?.disk_free_bytes as f64));
    page.gauge("vm_guest_disk_free", Some(Unit::Bytes), "Room that the guest's disk has left", disk_free);
    let load = each(|health| Some(health.guest.as_ref()?.load[0]));
    page.gauge("vm_guest_load", None, "The guest's load of the last minute", load);
    let cpu = each(|health| Some(health.guest.as_ref()?.cpu_s));
    page.counter("vm_guest_cpu", Some(Unit::Seconds), "CPU time that the guest says it used", cpu);
    let kills = each(|health| Some(health.guest.as_ref()?.oom_kills as f64));
    page.counter("vm_guest_oom_kills", None, "Programs killed for want of memory", kills);
}
