//! Between Python's values and the core's.

use std::net::IpAddr;
use std::path::PathBuf;

use pyo3::exceptions::{PyModuleNotFoundError, PyTypeError};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyBool, PyByteArray, PyBytes, PyDict, PyFloat, PyInt, PyList, PyString, PyTuple};
use serde_json::{json, Map, Number, Value};

use super::errors;
use crate::error::Error;
use crate::image::GuestImage;
use crate::model::{
    Backend, BootImage, IsolationType, Labels, NetworkConfig, NetworkText, ResourceLimits, SpecPatch, TemplateName,
    VmId, VmState,
};
use crate::store;

const PACKAGE: &str = "thirstys_waterfall.security.microvm_isolation";
/// Nesting of a JSON document; the parser on the other side stops at 128.
const MAX_DEPTH: usize = 100;

pub fn shown(value: &Bound<'_, PyAny>) -> String {
    let text = value.repr().map_or_else(|_| "an object without repr".to_owned(), |repr| repr.to_string());
    match text.char_indices().nth(80) {
        Some((cut, _)) => format!("{}...", &text[..cut]),
        None => text,
    }
}

fn wrong_type(field: &str, value: &Bound<'_, PyAny>, allowed: &str) -> PyErr {
    let kind = value.get_type().name().map_or_else(|_| "?".to_owned(), |name| name.to_string());
    let shown = format!("{} ({kind})", shown(value));
    errors::raise(value.py(), &Error::InvalidType { field: field.into(), value: shown, allowed: allowed.into() })
}

fn invalid(py: Python<'_>, field: &str, value: String, allowed: &str) -> PyErr {
    errors::raise(py, &Error::InvalidValue { field: field.into(), value, allowed: allowed.into() })
}

/// A member of a Python enum, by its value.
fn enum_value<'py>(value: &Bound<'py, PyAny>) -> PyResult<Option<Bound<'py, PyAny>>> {
    let class = value.py().import("enum")?.getattr("Enum")?;
    if value.is_instance(&class)? {
        value.getattr("value").map(Some)
    } else {
        Ok(None)
    }
}

/// The text of a string or an enum's member; `None` for anything else.
fn name_of(value: &Bound<'_, PyAny>) -> PyResult<Option<String>> {
    let value = enum_value(value)?.unwrap_or_else(|| value.clone());
    match value.cast::<PyString>() {
        Ok(text) => Ok(Some(text.to_string_lossy().into_owned())),
        Err(_) => Ok(None),
    }
}

macro_rules! named {
    ($function:ident, $type:ident, $field:literal) => {
        pub fn $function(value: &Bound<'_, PyAny>) -> PyResult<$type> {
            let allowed = concat!("a ", stringify!($type), " member or its name");
            let name = name_of(value)?.ok_or_else(|| wrong_type($field, value, allowed))?;
            $type::parse(&name).map_err(|error| errors::raise(value.py(), &error))
        }
    };
}
named!(backend, Backend, "backend");
named!(isolation_type, IsolationType, "isolation_type");

pub fn vm_state(value: &Bound<'_, PyAny>) -> PyResult<VmState> {
    let name = name_of(value)?.ok_or_else(|| wrong_type("state", value, "a VMState member or its name"))?;
    let wanted = name.to_ascii_lowercase();
    VmState::ALL.into_iter().find(|state| state.as_str() == wanted).ok_or_else(|| {
        let names: Vec<_> = VmState::ALL.into_iter().map(VmState::as_str).collect();
        invalid(value.py(), "state", format!("{name:?}"), &format!("one of {}", names.join(", ")))
    })
}

pub fn vm_id(value: &Bound<'_, PyAny>) -> PyResult<VmId> {
    let text = text("vm_id", value)?;
    VmId::parse(&text).map_err(|error| errors::raise(value.py(), &error))
}

pub fn template(field: &str, value: &Bound<'_, PyAny>) -> PyResult<TemplateName> {
    let name = text(field, value)?;
    TemplateName::parse(field, &name).map_err(|error| errors::raise(value.py(), &error))
}

fn optional_template(field: &str, value: Option<&Bound<'_, PyAny>>) -> PyResult<Option<TemplateName>> {
    value.filter(|value| !value.is_none()).map(|value| template(field, value)).transpose()
}

pub fn text(field: &str, value: &Bound<'_, PyAny>) -> PyResult<String> {
    let text = value.cast::<PyString>().map_err(|_| wrong_type(field, value, "a string"))?;
    // A lone surrogate is no text that a JSON document could carry.
    text.extract::<String>().map_err(|_| invalid(value.py(), field, shown(value), "text that UTF-8 can hold"))
}

fn optional_text(field: &str, value: &Bound<'_, PyAny>) -> PyResult<Option<String>> {
    if value.is_none() {
        Ok(None)
    } else {
        text(field, value).map(Some)
    }
}

/// A path from a string or an `os.PathLike`; `None` from `None`.
pub fn optional_path(field: &str, value: Option<&Bound<'_, PyAny>>) -> PyResult<Option<PathBuf>> {
    value.filter(|value| !value.is_none()).map(|value| path(field, value)).transpose()
}

/// As [`optional_path`], made absolute; a leading `~` is the user's home.
pub fn optional_absolute(field: &str, value: Option<&Bound<'_, PyAny>>) -> PyResult<Option<PathBuf>> {
    let Some((path, value)) = optional_path(field, value)?.zip(value) else { return Ok(None) };
    store::path::absolute(field, &path).map(Some).map_err(|error| errors::raise(value.py(), &error))
}

/// A path from a string or an `os.PathLike`.
pub fn path(field: &str, value: &Bound<'_, PyAny>) -> PyResult<PathBuf> {
    let path: PathBuf = value.extract().map_err(|_| wrong_type(field, value, "a path: a string or an os.PathLike"))?;
    let text = path.to_str().filter(|text| !text.is_empty() && !text.contains('\0'));
    match text {
        Some(_) => Ok(path),
        None => Err(invalid(value.py(), field, shown(value), "a path that is not empty, in UTF-8, without NUL")),
    }
}

/// A number of seconds.
pub fn seconds(field: &str, value: &Bound<'_, PyAny>) -> PyResult<std::time::Duration> {
    seconds_where(field, value, "a number of seconds from 0 to 86400", |number| number >= 0.0)
}

/// As [`seconds`], without 0: how long a program may run.
pub fn seconds_above_0(field: &str, value: &Bound<'_, PyAny>) -> PyResult<std::time::Duration> {
    seconds_where(field, value, "a number of seconds above 0 and at most 86400", |number| number > 0.0)
}

fn seconds_where(
    field: &str,
    value: &Bound<'_, PyAny>,
    allowed: &str,
    is_allowed: impl FnOnce(f64) -> bool,
) -> PyResult<std::time::Duration> {
    if value.is_instance_of::<PyBool>() || !(value.is_instance_of::<PyInt>() || value.is_instance_of::<PyFloat>()) {
        return Err(wrong_type(field, value, allowed));
    }
    match value.extract::<f64>() {
        Ok(number) if is_allowed(number) && number <= 86_400.0 => Ok(std::time::Duration::from_secs_f64(number)),
        _ => Err(invalid(value.py(), field, shown(value), allowed)),
    }
}

fn whole(field: &str, value: &Bound<'_, PyAny>) -> PyResult<u64> {
    if value.is_instance_of::<PyBool>() || !value.is_instance_of::<PyInt>() {
        return Err(wrong_type(field, value, "an int"));
    }
    value.extract().map_err(|_| invalid(value.py(), field, shown(value), "a whole number above 0"))
}

/// A whole number from `low` to `high`.
pub fn whole_in(field: &str, value: &Bound<'_, PyAny>, low: u64, high: u64) -> PyResult<u64> {
    let allowed = format!("a whole number from {low} to {high}");
    if value.is_instance_of::<PyBool>() || !value.is_instance_of::<PyInt>() {
        return Err(wrong_type(field, value, &allowed));
    }
    let number = value.extract().ok().filter(|number| (low..=high).contains(number));
    number.ok_or_else(|| invalid(value.py(), field, shown(value), &allowed))
}

/// An address of IPv4 or IPv6.
pub fn ip_address(field: &str, value: &Bound<'_, PyAny>) -> PyResult<IpAddr> {
    let text = text(field, value)?;
    let allowed = "an IPv4 or IPv6 address, such as 127.0.0.1 or ::1, and no name";
    text.parse().map_err(|_| invalid(value.py(), field, shown(value), allowed))
}

/// One of these words.
pub fn one_of(field: &str, value: &Bound<'_, PyAny>, words: &[&'static str]) -> PyResult<&'static str> {
    let text = text(field, value)?;
    let found = words.iter().find(|word| **word == text);
    found.copied().ok_or_else(|| invalid(value.py(), field, shown(value), &format!("one of {}", words.join(", "))))
}

/// The bytes of a `bytes`, `bytearray` or contiguous `memoryview`.
pub fn bytes(field: &str, value: &Bound<'_, PyAny>) -> PyResult<Vec<u8>> {
    if let Ok(bytes) = value.cast::<PyBytes>() {
        return Ok(bytes.as_bytes().to_vec());
    }
    let memoryview = value.py().import("builtins")?.getattr("memoryview")?;
    if value.is_instance_of::<PyByteArray>() || value.is_instance(&memoryview)? {
        return Ok(value.py().get_type::<PyBytes>().call1((value,))?.cast::<PyBytes>()?.as_bytes().to_vec());
    }
    Err(wrong_type(field, value, "bytes, bytearray or memoryview"))
}

/// A callable; `None` from `None`.
pub fn optional_callable<'a, 'py>(
    field: &str,
    value: Option<&'a Bound<'py, PyAny>>,
) -> PyResult<Option<&'a Bound<'py, PyAny>>> {
    match value.filter(|value| !value.is_none()) {
        Some(value) if !value.is_callable() => Err(wrong_type(field, value, "callable")),
        value => Ok(value),
    }
}

fn optional_whole(field: &str, value: &Bound<'_, PyAny>) -> PyResult<Option<u64>> {
    if value.is_none() {
        Ok(None)
    } else {
        whole(field, value).map(Some)
    }
}

/// Limits from the fields in their order; the last two may be `None`.
pub fn limits_from(
    py: Python<'_>,
    values: [&Bound<'_, PyAny>; 6],
    [disk_bytes_per_s, disk_ops_per_s]: [&Bound<'_, PyAny>; 2],
) -> PyResult<ResourceLimits> {
    let [vcpu_count, memory_mb, disk_size_mb, network_bandwidth_mbps, max_file_handles, max_processes] = values;
    let limits = ResourceLimits {
        vcpu_count: whole("vcpu_count", vcpu_count)?,
        memory_mb: whole("memory_mb", memory_mb)?,
        disk_size_mb: whole("disk_size_mb", disk_size_mb)?,
        network_bandwidth_mbps: whole("network_bandwidth_mbps", network_bandwidth_mbps)?,
        max_file_handles: whole("max_file_handles", max_file_handles)?,
        max_processes: whole("max_processes", max_processes)?,
        disk_bytes_per_s: optional_whole("disk_bytes_per_s", disk_bytes_per_s)?,
        disk_ops_per_s: optional_whole("disk_ops_per_s", disk_ops_per_s)?,
    };
    limits.check().map_err(|error| errors::raise(py, &error))?;
    Ok(limits)
}

/// A network configuration from the nine fields in their order.
pub fn network_from(values: [&Bound<'_, PyAny>; 9]) -> PyResult<NetworkConfig> {
    let [tap_device, ip_address, mac_address, gateway, dns_servers, isolated_network, egress, ipv6, mode] = values;
    let network = NetworkText {
        tap_device: optional_text("tap_device", tap_device)?,
        ip_address: optional_text("ip_address", ip_address)?,
        mac_address: optional_text("mac_address", mac_address)?,
        gateway: optional_text("gateway", gateway)?,
        dns_servers: texts("dns_servers", dns_servers, "a list of IP addresses as strings")?,
        isolated_network: flag("isolated_network", isolated_network)?,
        egress: match egress.is_none() {
            true => None,
            false => Some(texts("egress", egress, "None or a list of addresses, networks and host names as strings")?),
        },
        ipv6: flag("ipv6", ipv6)?,
        mode: text("mode", mode)?,
    };
    NetworkConfig::parse(network).map_err(|error| errors::raise(tap_device.py(), &error))
}

fn texts(field: &str, value: &Bound<'_, PyAny>, allowed: &str) -> PyResult<Vec<String>> {
    if !value.is_instance_of::<PyList>() && !value.is_instance_of::<PyTuple>() {
        return Err(wrong_type(field, value, allowed));
    }
    value.try_iter()?.map(|item| text(field, &item?)).collect()
}

fn flag(field: &str, value: &Bound<'_, PyAny>) -> PyResult<bool> {
    value.cast::<PyBool>().map(|flag| flag.is_true()).map_err(|_| wrong_type(field, value, "True or False"))
}

fn check_class(field: &str, value: &Bound<'_, PyAny>, class: &str) -> PyResult<()> {
    let wanted = value.py().import(format!("{PACKAGE}._models"))?.getattr(class)?;
    if value.is_instance(&wanted)? {
        Ok(())
    } else {
        Err(wrong_type(field, value, &format!("a {class}")))
    }
}

/// A `VMResourceLimits`, checked again: its fields may have been changed since it was made.
pub fn limits(value: &Bound<'_, PyAny>) -> PyResult<ResourceLimits> {
    check_class("resource_limits", value, "VMResourceLimits")?;
    let field = |name: &str| value.getattr(name);
    let values = [
        field("vcpu_count")?,
        field("memory_mb")?,
        field("disk_size_mb")?,
        field("network_bandwidth_mbps")?,
        field("max_file_handles")?,
        field("max_processes")?,
    ];
    let rates = [field("disk_bytes_per_s")?, field("disk_ops_per_s")?];
    limits_from(value.py(), values.each_ref(), rates.each_ref())
}

/// A `VMNetworkConfig`, checked again.
pub fn network(value: &Bound<'_, PyAny>) -> PyResult<NetworkConfig> {
    check_class("network_config", value, "VMNetworkConfig")?;
    let field = |name: &str| value.getattr(name);
    let values = [
        field("tap_device")?,
        field("ip_address")?,
        field("mac_address")?,
        field("gateway")?,
        field("dns_servers")?,
        field("isolated_network")?,
        field("egress")?,
        field("ipv6")?,
        field("mode")?,
    ];
    network_from(values.each_ref())
}

/// What a VM is to be, in the arguments that every constructor of one has; `None`: it was left out.
#[derive(Default)]
pub struct SpecArguments<'a, 'py> {
    pub backend: Option<&'a Bound<'py, PyAny>>,
    pub resource_limits: Option<&'a Bound<'py, PyAny>>,
    pub network_config: Option<&'a Bound<'py, PyAny>>,
    pub kernel_path: Option<&'a Bound<'py, PyAny>>,
    pub rootfs_path: Option<&'a Bound<'py, PyAny>>,
    pub template: Option<&'a Bound<'py, PyAny>>,
    pub labels: Option<&'a Bound<'py, PyAny>>,
}

impl SpecArguments<'_, '_> {
    /// Parses each of them. Paths become absolute: later the working directory may be another one.
    pub fn parse(&self) -> PyResult<SpecPatch> {
        Ok(SpecPatch {
            limits: self.resource_limits.map(limits).transpose()?,
            backend: self.backend.map(backend).transpose()?,
            network: self.network_config.map(network).transpose()?,
            image: BootImage {
                kernel_path: optional_absolute("kernel_path", self.kernel_path)?,
                rootfs_path: optional_absolute("rootfs_path", self.rootfs_path)?,
            },
            template: optional_template("template", self.template)?,
            labels: self.labels.map(labels).transpose()?,
        })
    }
}

/// Labels from a mapping of strings to strings.
pub fn labels(value: &Bound<'_, PyAny>) -> PyResult<Labels> {
    let items = items("labels", value)?.ok_or_else(|| wrong_type("labels", value, "a dict of strings"))?;
    let pair = |(key, item): (String, Bound<'_, PyAny>)| {
        let item = text(&format!("labels[{key:?}]"), &item)?;
        Ok((key, item))
    };
    let pairs = items.into_iter().map(pair).collect::<PyResult<_>>()?;
    Labels::parse(pairs).map_err(|error| errors::raise(value.py(), &error))
}

/// A member of one of the package's enums.
pub fn member<'py>(py: Python<'py>, class: &str, value: &str) -> PyResult<Bound<'py, PyAny>> {
    py.import(format!("{PACKAGE}._enums"))?.getattr(class)?.call1((value,))
}

/// A new object of one of the package's dataclasses.
pub fn model<'py>(py: Python<'py>, class: &str, fields: &Value) -> PyResult<Bound<'py, PyAny>> {
    let fields = from_json(py, fields)?;
    py.import(format!("{PACKAGE}._models"))?.getattr(class)?.call((), Some(fields.cast::<PyDict>()?))
}

/// The files that were installed beside this module.
pub fn guest_image(py: Python<'_>) -> PyResult<GuestImage> {
    let file: PathBuf = py.import(format!("{PACKAGE}._native"))?.getattr("__file__")?.extract()?;
    let file = std::path::absolute(file)?;
    if file.to_str().is_none() {
        let reason = "its path is no UTF-8: install the package in another folder";
        return Err(errors::raise(py, &Error::host("use", file.display(), reason)));
    }
    let parent = file.parent().ok_or_else(|| PyTypeError::new_err("the module has no directory"))?;
    Ok(GuestImage { qemu: packaged_qemu(py)?, ..GuestImage::in_directory(&parent.join("_data")) })
}

/// The QEMU of the package `thirstys-waterfall-microvm-qemu`; `None` where that is not installed.
///
/// Looked for when this module is imported, and again only where that failed: imports take locks, which a child that was forked
/// in the midst of one would wait for.
pub fn packaged_qemu(py: Python<'_>) -> PyResult<Option<PathBuf>> {
    static FOUND: PyOnceLock<Option<PathBuf>> = PyOnceLock::new();
    let look = || match py.import("thirstys_waterfall_microvm_qemu") {
        Ok(package) => package.call_method0("path")?.extract().map(Some),
        Err(error) if error.is_instance_of::<PyModuleNotFoundError>(py) => Ok(None),
        Err(error) => Err(error),
    };
    FOUND.get_or_try_init(py, look).cloned()
}

/// A JSON object from a Python mapping.
pub fn object(field: &str, value: &Bound<'_, PyAny>) -> PyResult<Map<String, Value>> {
    match to_json(field, value, 0)? {
        Value::Object(map) => Ok(map),
        _ => Err(wrong_type(field, value, "a dict")),
    }
}

/// JSON from Python's plain data.
pub fn json(field: &str, value: &Bound<'_, PyAny>) -> PyResult<Value> {
    to_json(field, value, 0)
}

/// JSON from Python's plain data; enum members stand for their values, paths for their text.
fn to_json(field: &str, value: &Bound<'_, PyAny>, depth: usize) -> PyResult<Value> {
    let py = value.py();
    if depth > MAX_DEPTH {
        return Err(invalid(
            py,
            field,
            "data".into(),
            &format!("nested at most {MAX_DEPTH} deep (or it holds itself)"),
        ));
    }
    if value.is_none() {
        return Ok(Value::Null);
    }
    if let Ok(flag) = value.cast::<PyBool>() {
        return Ok(Value::Bool(flag.is_true()));
    }
    if let Some(inner) = enum_value(value)? {
        return to_json(field, &inner, depth + 1);
    }
    if value.is_instance_of::<PyInt>() {
        let number = value.extract::<i64>().map(Number::from).or_else(|_| value.extract::<u64>().map(Number::from));
        return number
            .map(Value::Number)
            .map_err(|_| invalid(py, field, shown(value), "an integer of at most 64 bits"));
    }
    if value.is_instance_of::<PyFloat>() {
        let number = Number::from_f64(value.extract()?);
        return number.map(Value::Number).ok_or_else(|| invalid(py, field, shown(value), "a finite number"));
    }
    if value.is_instance_of::<PyString>() {
        return text(field, value).map(Value::String);
    }
    if value.is_instance_of::<PyList>() || value.is_instance_of::<PyTuple>() {
        let items = value.try_iter()?.enumerate();
        return items.map(|(i, item)| to_json(&format!("{field}[{i}]"), &item?, depth + 1)).collect();
    }
    if let Some(items) = items(field, value)? {
        let mut map = Map::new();
        for (key, item) in items {
            let item = to_json(&format!("{field}[{key:?}]"), &item, depth + 1)?;
            map.insert(key, item);
        }
        return Ok(Value::Object(map));
    }
    if value.hasattr("__fspath__")? {
        let path = value.call_method0("__fspath__")?;
        return text(field, &path).map(Value::String);
    }
    Err(wrong_type(field, value, "made of dict, list, str, int, float, bool and None"))
}

type Item<'py> = (String, Bound<'py, PyAny>);

/// The items of a mapping with strings as keys; `None` for anything else.
fn items<'py>(field: &str, value: &Bound<'py, PyAny>) -> PyResult<Option<Vec<Item<'py>>>> {
    let mapping = value.py().import("collections.abc")?.getattr("Mapping")?;
    if !value.is_instance(&mapping)? {
        return Ok(None);
    }
    let item = |pair: PyResult<Bound<'py, PyAny>>| {
        let (key, item): (Bound<'_, PyAny>, Bound<'_, PyAny>) = pair?.extract()?;
        if !key.is_instance_of::<PyString>() {
            return Err(wrong_type(&format!("a key of {field}"), &key, "a string"));
        }
        Ok((text(field, &key)?, item))
    };
    value.call_method0("items")?.try_iter()?.map(item).collect::<PyResult<_>>().map(Some)
}

/// Python's plain data from JSON.
pub fn from_json<'py>(py: Python<'py>, value: &Value) -> PyResult<Bound<'py, PyAny>> {
    Ok(match value {
        Value::Null => py.None().into_bound(py),
        Value::Bool(flag) => PyBool::new(py, *flag).to_owned().into_any(),
        Value::Number(number) => match (number.as_u64(), number.as_i64()) {
            (Some(number), _) => number.into_pyobject(py)?.into_any(),
            (None, Some(number)) => number.into_pyobject(py)?.into_any(),
            (None, None) => PyFloat::new(py, number.as_f64().unwrap_or(f64::NAN)).into_any(),
        },
        Value::String(text) => PyString::new(py, text).into_any(),
        Value::Array(items) => {
            let list = PyList::empty(py);
            for item in items {
                list.append(from_json(py, item)?)?;
            }
            list.into_any()
        }
        Value::Object(map) => {
            let dict = PyDict::new(py);
            for (key, item) in map {
                dict.set_item(key, from_json(py, item)?)?;
            }
            dict.into_any()
        }
    })
}

pub fn limits_json(limits: &ResourceLimits) -> Value {
    serde_json::to_value(limits).unwrap_or_else(|_| json!({}))
}

pub fn network_json(network: &NetworkConfig) -> Value {
    serde_json::to_value(network).unwrap_or_else(|_| json!({}))
}
