//! Lists of options as `-o` takes them: `key=value,key=value`, where `,,` in a value is a comma.

use super::Failure;

/// What the options of several `-o` say, in order.
pub fn parse(lists: &[&str]) -> Result<Vec<(String, String)>, Failure> {
    let mut options = Vec::new();
    for list in lists {
        let invalid = list.is_empty() || list.starts_with(',') || trailing_commas(list) % 2 == 1;
        if invalid {
            return Err(Failure::new(format!("Invalid option list: {list}")));
        }
        for part in split(list) {
            options.push(match part.split_once('=') {
                Some((key, value)) => (key.to_owned(), value.to_owned()),
                None if part == "help" || part == "?" => ("help".to_owned(), String::new()),
                None => match part.strip_prefix("no") {
                    Some(key) => (key.to_owned(), "off".to_owned()),
                    None => (part.clone(), "on".to_owned()),
                },
            });
        }
    }
    Ok(options)
}

fn trailing_commas(list: &str) -> usize {
    list.bytes().rev().take_while(|b| *b == b',').count()
}

fn split(list: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut chars = list.chars().peekable();
    while let Some(c) = chars.next() {
        if c == ',' && chars.next_if_eq(&',').is_none() {
            parts.push(String::new());
        } else if let Some(part) = parts.last_mut() {
            part.push(c);
        }
    }
    parts
}

/// `on`/`off` and their synonyms.
pub fn boolean(key: &str, value: &str) -> Result<bool, Failure> {
    match value {
        "on" | "yes" | "true" | "y" => Ok(true),
        "off" | "no" | "false" | "n" => Ok(false),
        _ => Err(Failure::new(format!("Parameter '{key}' expects 'on' or 'off'"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_split_at_single_commas() {
        let parsed = parse(&["data_file=a,,b,lazy_refcounts", "nodata_file_raw"]).unwrap();
        let expected = [("data_file", "a,b"), ("lazy_refcounts", "on"), ("data_file_raw", "off")];
        assert_eq!(parsed, expected.map(|(k, v)| (k.to_owned(), v.to_owned())));
        for list in ["", ",a=b", "a=b,"] {
            assert!(parse(&[list]).is_err(), "{list}");
        }
    }
}
