//! The Python face: handles, conversion, errors, logging and the one gate for blocking calls.
//!
//! Architecture invariant: the only module that knows Python, and it decides nothing: every rule is in the core. A
//! worker of the runtime never attaches to the interpreter.

mod aio;
mod attached;
mod channel;
mod convert;
mod doctor;
mod errors;
mod events;
mod gate;
mod instance;
mod logging;
mod manager;
mod ports;
mod stream;
mod transfer;

use pyo3::prelude::*;

use convert::{limits_from, network_from};

#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "one for each field")]
fn check_resource_limits(
    vcpu_count: &Bound<'_, PyAny>,
    memory_mb: &Bound<'_, PyAny>,
    disk_size_mb: &Bound<'_, PyAny>,
    network_bandwidth_mbps: &Bound<'_, PyAny>,
    max_file_handles: &Bound<'_, PyAny>,
    max_processes: &Bound<'_, PyAny>,
    disk_bytes_per_s: &Bound<'_, PyAny>,
    disk_ops_per_s: &Bound<'_, PyAny>,
) -> PyResult<()> {
    let values = [vcpu_count, memory_mb, disk_size_mb, network_bandwidth_mbps, max_file_handles, max_processes];
    limits_from(vcpu_count.py(), values, [disk_bytes_per_s, disk_ops_per_s]).map(drop)
}

#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "the fields of the public class")]
fn check_network_config(
    tap_device: &Bound<'_, PyAny>,
    ip_address: &Bound<'_, PyAny>,
    mac_address: &Bound<'_, PyAny>,
    gateway: &Bound<'_, PyAny>,
    dns_servers: &Bound<'_, PyAny>,
    isolated_network: &Bound<'_, PyAny>,
    egress: &Bound<'_, PyAny>,
    ipv6: &Bound<'_, PyAny>,
    mode: &Bound<'_, PyAny>,
) -> PyResult<()> {
    let values = [tap_device, ip_address, mac_address, gateway, dns_servers, isolated_network, egress, ipv6, mode];
    network_from(values).map(drop)
}

#[pyfunction]
fn check_vm_id(text: &Bound<'_, PyAny>) -> PyResult<()> {
    convert::vm_id(text).map(drop)
}

#[pymodule]
fn _native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    crate::host::fork::install();
    logging::install();
    // What is wrong with it is said when it is to be used.
    drop(convert::packaged_qemu(module.py()));
    module.add_class::<manager::MicroVMIsolationManager>()?;
    module.add_class::<instance::MicroVMInstance>()?;
    module.add_class::<channel::CommunicationChannel>()?;
    module.add_class::<attached::AttachedVM>()?;
    module.add_class::<stream::ProcessStream>()?;
    module.add_class::<ports::PublishedPort>()?;
    module.add_class::<events::EventStream>()?;
    module.add_class::<aio::OperationQueue>()?;
    module.add_class::<aio::VmOperations>()?;
    module.add_class::<aio::ManagerOperations>()?;
    module.add_class::<aio::PrepareOperation>()?;
    module.add_class::<aio::StreamOperations>()?;
    module.add_class::<aio::AttachedOperations>()?;
    module.add_class::<aio::EventOperations>()?;
    module.add_class::<aio::TakenEvent>()?;
    module.add_class::<aio::UploadOperations>()?;
    module.add_class::<aio::DownloadOperations>()?;
    module.add_function(wrap_pyfunction!(check_resource_limits, module)?)?;
    module.add_function(wrap_pyfunction!(check_network_config, module)?)?;
    module.add_function(wrap_pyfunction!(check_vm_id, module)?)?;
    module.add_function(wrap_pyfunction!(attached::running_vms, module)?)?;
    module.add_function(wrap_pyfunction!(aio::begin_attach, module)?)?;
    module.add_function(wrap_pyfunction!(aio::begin_running_vms, module)?)?;
    module.add_function(wrap_pyfunction!(doctor::doctor, module)?)?;
    module.add_function(wrap_pyfunction!(logging::next_log_records, module)?)?;
    module.add_function(wrap_pyfunction!(logging::close_log, module)?)?;
    module.add_function(wrap_pyfunction!(events::close_events, module)?)?;
    module.add_function(wrap_pyfunction!(gate::is_exiting, module)?)?;
    module.add_function(wrap_pyfunction!(gate::shutdown, module)?)?;
    Ok(())
}
