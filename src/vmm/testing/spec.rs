//! Holds requests against a VMM's own OpenAPI description, more strictly than that says: a field that it does not name is
//! an error, because Cloud Hypervisor would ignore it in silence.
//!
//! `tests/specs` has the descriptions, `VMM-VERSION.yaml`; `MICROVM_SPECS` names another folder, with those of other releases.

use std::path::PathBuf;

use serde_json::Value;

use crate::vmm::http::Call;

fn folder() -> PathBuf {
    let named = std::env::var_os("MICROVM_SPECS").map(PathBuf::from);
    named.unwrap_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/specs"))
}

/// Every description of `vmm` that is there must accept every call.
pub fn assert_valid(vmm: &str, calls: &[Call]) {
    let folder = folder();
    let mut held = 0;
    for entry in std::fs::read_dir(&folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if !(name.starts_with(&format!("{vmm}-")) && name.ends_with(".yaml")) {
            continue;
        }
        let document: Value = serde_norway::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        for call in calls {
            check(&document, call).unwrap_or_else(|why| panic!("{name}: {} {}: {why}", call.method, call.path));
        }
        held += 1;
    }
    assert!(held > 0, "{} has no description of {vmm}", folder.display());
}

fn check(document: &Value, call: &Call) -> Result<(), String> {
    let paths = document["paths"].as_object().ok_or("the description has no paths")?;
    // Cloud Hypervisor's are below the path of its server.
    let server = document["servers"][0]["url"].as_str().and_then(|url| url.find("/api").map(|at| &url[at..]));
    let path = call.path.strip_prefix(server.unwrap_or("")).unwrap_or(&call.path);
    let operation = paths.iter().find(|(template, _)| fits(template, path)).ok_or("no such path")?.1;
    let operation = operation.get(call.method.as_str().to_lowercase()).ok_or("no such method")?;
    let in_body = operation["parameters"].as_array().into_iter().flatten().find(|parameter| parameter["in"] == "body");
    let schema = in_body
        .map(|parameter| &parameter["schema"])
        .or_else(|| operation.pointer("/requestBody/content/application~1json/schema"));
    match (schema, &call.body) {
        (None, None) => Ok(()),
        (Some(schema), Some(body)) => {
            let body: Value = serde_json::from_slice(body).map_err(|error| error.to_string())?;
            conforms(document, schema, &body, "body")
        }
        (None, Some(_)) => Err("takes no body".into()),
        (Some(_), None) => Err("wants a body".into()),
    }
}

fn fits(template: &str, path: &str) -> bool {
    let (mut wanted, mut given) = (template.split('/'), path.split('/'));
    let all = wanted.by_ref().zip(given.by_ref()).all(|(a, b)| a.starts_with('{') || a == b);
    all && template.matches('/').count() == path.matches('/').count()
}

fn conforms(document: &Value, schema: &Value, value: &Value, at: &str) -> Result<(), String> {
    if let Some(reference) = schema["$ref"].as_str() {
        let target = document.pointer(reference.trim_start_matches('#')).ok_or(format!("{reference} is not there"))?;
        return conforms(document, target, value, at);
    }
    if let Some(allowed) = schema["enum"].as_array() {
        return if allowed.contains(value) { Ok(()) } else { Err(format!("{at}: {value} is none of {allowed:?}")) };
    }
    let wrong = || Err(format!("{at}: {value} is no {}", schema["type"]));
    match schema["type"].as_str() {
        Some("object") => {
            let Some(fields) = value.as_object() else { return wrong() };
            for name in schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str) {
                fields.get(name).ok_or(format!("{at}.{name} is missing"))?;
            }
            for (name, value) in fields {
                let schema = schema["properties"].get(name).ok_or(format!("{at}.{name} is not in the description"))?;
                conforms(document, schema, value, &format!("{at}.{name}"))?;
            }
            Ok(())
        }
        Some("array") => {
            let Some(items) = value.as_array() else { return wrong() };
            items.iter().try_for_each(|item| conforms(document, &schema["items"], item, at))
        }
        Some("string") if value.is_string() => Ok(()),
        Some("boolean") if value.is_boolean() => Ok(()),
        Some("integer") => {
            let Some(number) = value.as_i64() else { return wrong() };
            let within = schema["minimum"].as_i64().is_none_or(|least| number >= least)
                && schema["maximum"].as_i64().is_none_or(|most| number <= most);
            if within {
                Ok(())
            } else {
                Err(format!("{at}: {number} is out of range"))
            }
        }
        _ => wrong(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn document() -> Value {
        json!({"paths": {"/vm/{id}": {"put": {"parameters": [
            {"in": "path"}, {"in": "body", "schema": {"$ref": "#/definitions/Vm"}}]}}},
            "definitions": {"Vm": {"type": "object", "required": ["n"],
                "properties": {"n": {"type": "integer", "minimum": 1}, "s": {"type": "string", "enum": ["a"]}}}}})
    }

    #[test]
    fn test_check_refuses_what_the_description_does() {
        let why = |path: &'static str, body: Value| check(&document(), &Call::put(path, &body)).err();
        assert_eq!(why("/vm/7", json!({"n": 1, "s": "a"})), None);
        for (path, body) in [
            ("/vm", json!({"n": 1})),
            ("/vm/7", json!({})),
            ("/vm/7", json!({"n": 0})),
            ("/vm/7", json!({"n": "1"})),
            ("/vm/7", json!({"n": 1, "s": "b"})),
            ("/vm/7", json!({"n": 1, "more": true})),
        ] {
            assert!(why(path, body.clone()).is_some(), "{path} {body}");
        }
    }
}
