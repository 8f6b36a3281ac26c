//! A VM as plain data, for its handle and for attached clients.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{json, Map, Value};

use super::network::{self, Connected};
use super::{Health, MicroVm};
use crate::model::{Backend, GuestUse, NetworkConfig, NetworkText};
use crate::net::Problem;

pub fn health_json(health: &Health) -> Value {
    json!({
        "cpu_usage_percent": health.cpu_usage_percent,
        "memory_usage_mb": health.memory_usage_mb,
        "disk_io_bytes": health.disk_io_bytes,
        "network_rx_bytes": health.network_rx_bytes,
        "network_tx_bytes": health.network_tx_bytes,
        "uptime_seconds": health.uptime_seconds,
        "last_health_check": health.last_health_check,
        "health_status": health.report.status.as_str(),
    })
}

/// What there is to say beyond the metrics: why, and what guest and host count.
fn health_info(vm: &MicroVm, health: &Health) -> Value {
    let report = &health.report;
    let (since, history) = vm.history_json();
    json!({
        "status": report.status.as_str(),
        "reason": report.reason.as_str(),
        "detail": report.detail,
        "since": since,
        "heartbeats_missed": report.missed,
        "round_trip_seconds": health.round_trip_s,
        "clock_offset_seconds": health.clock_offset_s,
        "guest": health.guest.as_ref().map(GuestUse::to_json),
        "host": {
            "cpu_seconds": health.cpu_s,
            "resident_memory_mb": health.memory_usage_mb,
            "group_memory_bytes": health.group.memory_bytes,
            "oom_kills": health.group.oom_kills,
            "throttled_seconds": health.group.throttled_us.map(|us| us as f64 / 1e6),
            "memory_pressure_percent": health.group.memory_pressure_centi.map(|centi| centi as f64 / 100.0),
        },
        "history": history,
    })
}

/// What the VM got while it is connected, else what it asked for.
fn network_info(network: &NetworkConfig, connected: Option<&Connected>, problems: &[Problem]) -> Value {
    let network = NetworkText::from(network.clone());
    let mut info = json!({
        "isolated": network.isolated_network,
        "tap_device": network.tap_device,
        "ip_address": network.ip_address,
        "mac_address": network.mac_address,
        "gateway": network.gateway,
        "dns_servers": network.dns_servers,
        "egress": network.egress,
        "ipv6": network.ipv6,
        "mode": network.mode,
        "problems": problems.iter().map(|Problem { what, remedy, .. }| json!({"what": what, "remedy": remedy})).collect::<Vec<_>>(),
    });
    if let Some(connected) = connected {
        let addresses = &connected.addresses;
        info["mode"] = json!(connected.mode.as_str());
        info["mode_reason"] = json!(connected.reason);
        info["tap_device"] = json!(connected.tap);
        info["ip_address"] = json!(addresses.address);
        info["prefix_length"] = json!(addresses.prefix);
        info["mac_address"] = json!(connected.mac.to_string());
        info["gateway"] = json!(addresses.gateway);
        info["dns_servers"] = json!(connected.guest_servers);
    }
    info
}

fn start_json(origin: &str, stages: &[(&'static str, Duration)]) -> Value {
    let stages: Map<String, Value> =
        stages.iter().map(|(stage, length)| ((*stage).to_owned(), json!(length.as_secs_f64()))).collect();
    json!({"origin": origin, "stages_seconds": stages})
}

/// Everything there is to know about a VM, as plain data.
pub async fn info(vm: Arc<MicroVm>) -> Value {
    let health = vm.health().await;
    let (spec, facts) = (vm.spec(), vm.facts());
    let connected = facts.network.as_deref();
    let problems = match facts.network.clone() {
        None => Vec::new(),
        Some(connected) => {
            let looked = tokio::task::spawn_blocking(move || network::problems_of(&connected)).await;
            looked.unwrap_or_else(|error| {
                log::warn!("{}: its host's network was not looked at: {error}", vm.id());
                Vec::new()
            })
        }
    };
    let mut metrics = health_json(&health);
    metrics["status"] = json!(health.report.status.as_str());
    metrics["cpu_usage"] = json!(health.cpu_usage_percent);
    json!({
        "vm_id": vm.id(),
        "backend": facts.backend.unwrap_or(Backend::Qemu).as_str(),
        "backend_reason": facts.backend_reason,
        "isolation_type": spec.isolation_type.as_str(),
        "isolation_grade": facts.grade.map(|grade| grade.as_str()),
        "accelerator": facts.accelerator,
        "vmm": facts.vmm.map(|vmm| json!({"path": vmm.path, "version": vmm.version, "packaged": vmm.packaged})),
        "start": facts.origin.map(|origin| start_json(origin, &facts.stages)),
        "state": vm.state().as_str(),
        "suspended": vm.is_suspended(),
        "template": spec.template,
        "labels": spec.labels,
        "pid": facts.pid,
        "socket_path": facts.socket,
        "kernel_path": spec.image.kernel_path,
        "rootfs_path": spec.image.rootfs_path,
        "resource_limits": spec.limits,
        "jail": facts.jail,
        "limits": facts.limits,
        "network_config": network_info(&spec.network, connected, &problems),
        "health_metrics": metrics,
        "health": health_info(&vm, &health),
        "last_error": vm.last_error().map(|error| json!({"code": error.code(), "message": error.to_string()})),
    })
}

/// What there is to say at once, without the guest.
pub fn summary(vm: &MicroVm) -> Value {
    let (spec, facts) = (vm.spec(), vm.facts());
    json!({
        "vm_id": vm.id(),
        "state": vm.state().as_str(),
        "isolation_type": spec.isolation_type.as_str(),
        "isolation_grade": facts.grade.map(|grade| grade.as_str()),
        "backend": facts.backend.unwrap_or(Backend::Qemu).as_str(),
        "memory_mb": spec.limits.memory_mb,
        "vcpu_count": spec.limits.vcpu_count,
        "uptime_seconds": vm.running_for().map(|uptime| uptime.as_secs_f64()),
        "idle_seconds": vm.idle_for().map(|idle| idle.as_secs_f64()),
        "labels": spec.labels,
        "pid": facts.pid,
    })
}
