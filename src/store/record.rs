//! JSON records: sealed with a checksum, gated by a format number, read with a bound.

use std::io::Read as _;
use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::{StoreError, StoreResult, atomic, plain};

/// No record of ours comes near this; a hostile one must not fill the memory. Bytes.
const MAX_RECORD: u64 = 16 << 20;

/// Something that the store keeps as one JSON file.
pub trait Record: Serialize + DeserializeOwned {
    /// Newest format that this program reads and the one that it writes; in the file as `format`.
    const FORMAT: u64;

    /// Permissions of its file.
    const MODE: u32 = 0o644;

    /// Whether what it says can be: called after reading and before writing.
    fn check(&self) -> Result<(), String> {
        Ok(())
    }
}

/// Reads and checks a record: size, JSON, format, checksum, types, sense.
pub(super) fn read<T: Record>(path: &Path) -> StoreResult<T> {
    let text = read_bounded(path)?;
    let mut value: Value = serde_json::from_slice(&text)
        .map_err(|e| StoreError::damaged(path, format!("it is not whole JSON ({e})")))?;
    let object = value.as_object_mut().ok_or_else(|| StoreError::damaged(path, "it is not a JSON object"))?;
    let format = object.get("format").and_then(Value::as_u64);
    match format {
        None => return Err(StoreError::damaged(path, "it has no format number")),
        Some(found) if found > T::FORMAT => {
            return Err(StoreError::NewerFormat { path: path.to_path_buf(), found, known: T::FORMAT });
        }
        Some(_) => {}
    }
    let sealed = object.remove("checksum");
    let stated = sealed
        .as_ref()
        .and_then(Value::as_str)
        .ok_or_else(|| StoreError::damaged(path, "it has no checksum"))?;
    if stated != checksum(&value) {
        return Err(StoreError::damaged(path, "its checksum does not match what it says"));
    }
    let record: T = serde_json::from_value(value).map_err(|e| StoreError::damaged(path, e.to_string()))?;
    record.check().map_err(|what| StoreError::damaged(path, what))?;
    Ok(record)
}

/// Checks, seals and writes a record in one atomic step.
pub(super) fn write<T: Record>(path: &Path, record: &T) -> StoreResult<()> {
    record
        .check()
        .map_err(|what| StoreError::Invalid(format!("refusing to write {}: {what}", path.display())))?;
    atomic::write(path, seal(record, path)?.as_bytes(), T::MODE)
}

/// A record as the text of its file.
fn seal<T: Record>(record: &T, path: &Path) -> StoreResult<String> {
    #[derive(Serialize)]
    struct Sealed<'a, T> {
        format: u64,
        #[serde(flatten)]
        record: &'a T,
        #[serde(skip_serializing_if = "Option::is_none")]
        checksum: Option<String>,
    }
    let broken = |e: serde_json::Error| StoreError::Invalid(format!("cannot encode {}: {e}", path.display()));
    let mut sealed = Sealed { format: T::FORMAT, record, checksum: None };
    sealed.checksum = Some(checksum(&serde_json::to_value(&sealed).map_err(broken)?));
    let mut text = serde_json::to_string_pretty(&sealed).map_err(broken)?;
    text.push('\n');
    Ok(text)
}

/// 128 bits of BLAKE3 over the value with its keys sorted and no white space, in hexadecimal.
fn checksum(value: &Value) -> String {
    let mut canonical = String::new();
    canonicalise(value, &mut canonical);
    let hash = blake3::hash(canonical.as_bytes());
    hash.to_hex().as_str().chars().take(32).collect()
}

fn canonicalise(value: &Value, out: &mut String) {
    match value {
        Value::Object(map) => {
            let mut entries: Vec<_> = map.iter().collect();
            entries.sort_by_key(|(key, _)| key.as_str());
            out.push('{');
            for (key, value) in entries {
                out.push_str(&Value::from(key.as_str()).to_string());
                out.push(':');
                canonicalise(value, out);
                out.push(',');
            }
            out.push('}');
        }
        Value::Array(values) => {
            out.push('[');
            for value in values {
                canonicalise(value, out);
                out.push(',');
            }
            out.push(']');
        }
        scalar => out.push_str(&scalar.to_string()),
    }
}

fn read_bounded(path: &Path) -> StoreResult<Vec<u8>> {
    let file = plain::open(path)?;
    let mut text = Vec::new();
    file.take(MAX_RECORD + 1).read_to_end(&mut text).map_err(StoreError::io("read", path))?;
    if text.len() as u64 > MAX_RECORD {
        return Err(StoreError::damaged(path, "it is larger than 16 MiB"));
    }
    Ok(text)
}
