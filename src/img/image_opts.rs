//! An image named by options (`--image-opts driver=qcow2,file.filename=FILE`) instead of by its file's name.

use super::{Failure, optlist};

/// What the options say, as far as it is supported.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Named {
    /// The file's name, in a form that is read as a plain path.
    pub file: String,
    /// Its format; recognised where it is not given.
    pub format: Option<String>,
    /// Whether others may write meanwhile.
    pub share: bool,
}

/// Options that are about speed or what is stricter here anyway: the page cache is used, locks are taken.
const ACCEPTED: [&str; 16] = [
    "node-name",
    "file.node-name",
    "read-only",
    "auto-read-only",
    "discard",
    "detect-zeroes",
    "cache.direct",
    "cache.no-flush",
    "file.aio",
    "file.discard",
    "file.read-only",
    "file.auto-read-only",
    "file.cache.direct",
    "file.cache.no-flush",
    "file.drop-cache",
    "lazy-refcounts",
];

/// Reads such a list.
pub fn parse(text: &str) -> Result<Named, Failure> {
    let wrong = |why: String| Failure::new(format!("Could not open '{text}': {why}"));
    let (mut driver, mut file, mut share) = (None, None, false);
    for (key, value) in optlist::parse(&[text])? {
        match key.as_str() {
            "driver" => driver = Some(value),
            "file.filename" => file = Some(value),
            "file.driver" if matches!(value.as_str(), "file" | "host_device") => {}
            "force-share" => share = optlist::boolean(&key, &value)?,
            "file.locking" if matches!(value.as_str(), "auto" | "on") => {}
            known if ACCEPTED.contains(&known) => {}
            key if key.starts_with("encrypt.") => {
                return Err(wrong(format!("encryption ('{key}') is not supported")));
            }
            _ => {
                return Err(wrong(format!(
                    "the option '{key}={value}' is not supported: driver=raw|qcow2, file.driver=file, file.filename=FILE and force-share are"
                )));
            }
        }
    }
    let file = file.ok_or_else(|| wrong("it must name the image's file: file.filename=FILE".into()))?;
    // A name here is a path, whatever it looks like.
    let file = if super::name::protocol(&file).is_some() { format!("./{file}") } else { file };
    Ok(Named { file, format: driver, share })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_named_by_options() {
        let named = parse("driver=qcow2,file.driver=file,file.filename=/a,,b,cache.direct=on").unwrap();
        let expected = Named { file: "/a,b".into(), format: Some("qcow2".into()), share: false };
        assert_eq!(named, expected);
        let named = parse("file.filename=nbd:x,force-share=on").unwrap();
        assert_eq!(named, Named { file: "./nbd:x".into(), format: None, share: true });
    }

    #[test]
    fn what_is_not_supported_is_named() {
        for (text, word) in [
            ("driver=qcow2", "file.filename"),
            ("a.qcow2", "'a.qcow2=on'"),
            ("driver=qcow2,file.driver=nbd,file.host=h", "'file.driver=nbd'"),
            ("driver=qcow2,encrypt.key-secret=s,file.filename=a", "encryption"),
            ("driver=qcow2,backing.driver=raw,file.filename=a", "'backing.driver=raw'"),
            ("driver=qcow2,file.locking=off,file.filename=a", "'file.locking=off'"),
        ] {
            let failure = parse(text).unwrap_err();
            assert!(failure.text.contains(word), "{text}: {}", failure.text);
        }
    }
}
