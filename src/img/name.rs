//! Image names as QEMU reads them: plain paths, `file:` in front of one, or another protocol (which is refused).

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use super::Failure;

/// The protocol in front of a name, if it has one: what stands before the first `:`, unless a `/` comes first.
pub fn protocol(name: &str) -> Option<&str> {
    let at = name.find([':', '/'])?;
    name[at..].starts_with(':').then(|| &name[..at])
}

/// The file that a name means.
pub fn file(name: &OsStr) -> Result<PathBuf, Failure> {
    let Some(text) = name.to_str() else { return Ok(PathBuf::from(name)) };
    match protocol(text) {
        None => Ok(PathBuf::from(text)),
        Some("file") => {
            // Shown so that it can be given again as it is.
            let rest = &text["file:".len()..];
            Ok(if protocol(rest).is_some() { Path::new(".").join(rest) } else { PathBuf::from(rest) })
        }
        Some(protocol) => Err(Failure::new(format!(
            "Could not open '{text}': the protocol '{protocol}' is not supported: only files and block devices are (write a file of this name as ./{text})"
        ))),
    }
}

/// The name of a backing file as seen from where the image's own name is: names are relative to the image.
pub fn combine(image: &Path, backing: &str) -> String {
    if backing.starts_with('/') || protocol(backing).is_some() {
        return backing.to_owned();
    }
    let image = image.to_string_lossy();
    match image.rfind('/') {
        Some(at) => format!("{}{backing}", &image[..=at]),
        None => backing.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_files_are_opened() {
        assert_eq!(file(OsStr::new("file:a:b")).unwrap(), Path::new("./a:b"));
        assert_eq!(file(OsStr::new("./a:b")).unwrap(), Path::new("./a:b"));
        for name in ["nbd://h/x", "json:{}", "a:b"] {
            assert!(file(OsStr::new(name)).unwrap_err().text.contains("is not supported"), "{name}");
        }
    }

    #[test]
    fn a_backing_name_is_relative_to_its_image() {
        assert_eq!(combine(Path::new("d/x.q"), "../a"), "d/../a");
        assert_eq!(combine(Path::new("x.q"), "a"), "a");
        assert_eq!(combine(Path::new("/v/x.q"), "/a"), "/a");
        assert_eq!(combine(Path::new("d/x"), "nbd:a"), "nbd:a");
    }
}
