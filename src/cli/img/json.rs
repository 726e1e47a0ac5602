//! JSON as QEMU prints it: four spaces, ASCII only, and the keys of an object in the order of QEMU's hash table.

use std::fmt::Write as _;

/// A value to print.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Json {
    /// `true` or `false`.
    Bool(bool),
    /// A whole number.
    Number(i128),
    /// A text.
    Text(String),
    /// A list.
    List(Vec<Json>),
    /// Members in any order: they are printed in QEMU's.
    Object(Vec<(&'static str, Json)>),
}

impl From<bool> for Json {
    fn from(value: bool) -> Self {
        Self::Bool(value)
    }
}
impl From<u64> for Json {
    fn from(value: u64) -> Self {
        Self::Number(value.into())
    }
}
impl From<u32> for Json {
    fn from(value: u32) -> Self {
        Self::Number(value.into())
    }
}
impl From<&str> for Json {
    fn from(value: &str) -> Self {
        Self::Text(value.to_owned())
    }
}
impl From<String> for Json {
    fn from(value: String) -> Self {
        Self::Text(value)
    }
}

/// The slot of a key in QEMU's dictionaries (512 slots), by which their members are ordered when printed. The hash is
/// that of Samba's trivial database.
fn slot(key: &str) -> u32 {
    let seed = 0x238F_13AF_u32.wrapping_mul(key.len() as u32);
    let mixed = key
        .bytes()
        .zip(0u32..)
        .fold(seed, |sum, (byte, at)| sum.wrapping_add(u32::from(byte) << (at * 5 % 24)));
    1_103_515_243_u32.wrapping_mul(mixed).wrapping_add(12345) % 512
}

impl Json {
    /// The text of the value, without a line break at its end.
    pub fn pretty(&self) -> String {
        let mut out = String::new();
        self.write(&mut out, 0);
        out
    }

    fn write(&self, out: &mut String, depth: usize) {
        let line = |out: &mut String, depth: usize| {
            out.push('\n');
            out.push_str(&"    ".repeat(depth));
        };
        match self {
            Json::Bool(value) => out.push_str(if *value { "true" } else { "false" }),
            Json::Number(value) => {
                let _ = write!(out, "{value}");
            }
            Json::Text(text) => quote(out, text),
            Json::List(items) => {
                out.push('[');
                for (at, item) in items.iter().enumerate() {
                    out.push_str(if at > 0 { "," } else { "" });
                    line(out, depth + 1);
                    item.write(out, depth + 1);
                }
                line(out, depth);
                out.push(']');
            }
            Json::Object(members) => {
                let mut members: Vec<_> = members.iter().collect();
                members.sort_by_key(|(key, _)| slot(key));
                out.push('{');
                for (at, (key, value)) in members.into_iter().enumerate() {
                    out.push_str(if at > 0 { "," } else { "" });
                    line(out, depth + 1);
                    quote(out, key);
                    out.push_str(": ");
                    value.write(out, depth + 1);
                }
                line(out, depth);
                out.push('}');
            }
        }
    }
}

fn quote(out: &mut String, text: &str) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            ' '..='~' => out.push(c),
            _ => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    let _ = write!(out, "\\u{unit:04X}");
                }
            }
        }
    }
    out.push('"');
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_come_in_the_order_of_qemus_table() {
        let object =
            |keys: &[&'static str]| Json::Object(keys.iter().map(|k| (*k, Json::Bool(true))).collect());
        let printed = object(&["dirty-flag", "format", "filename", "children", "virtual-size"]).pretty();
        let order: Vec<&str> =
            printed.lines().filter_map(|l| l.trim().strip_prefix('"')?.split('"').next()).collect();
        assert_eq!(order, ["children", "virtual-size", "filename", "format", "dirty-flag"]);
    }

    #[test]
    fn text_is_ascii_and_empty_lists_take_two_lines() {
        assert_eq!(Json::from("a\"\\\n\u{7f}ü😀").pretty(), r#""a\"\\\n\u007F\u00FC\uD83D\uDE00""#);
        assert_eq!(Json::List(Vec::new()).pretty(), "[\n]");
    }
}
