//! What QEMU does when a disk cannot be read or written, as a `<driver>` says it.

use roxmltree::{Document, Node};

use super::{child, disk_nodes, set_attribute, splice};
use crate::hypervisor::ErrorPolicy;

/// The policy of a disk; the default where the definition has no such disk.
///
/// # Errors
/// The text is no XML.
pub fn error_policy(text: &str, target: &str) -> Result<ErrorPolicy, String> {
    let document = Document::parse(text).map_err(|e| format!("is no XML: {e}"))?;
    let driver = find(&document, target).and_then(|disk| child(disk, "driver"));
    let value = |name: &str| driver.and_then(|d| d.attribute(name)).map(str::to_owned);
    Ok(ErrorPolicy { error: value("error_policy"), read: value("rerror_policy") })
}

/// Gives a disk this policy. The same text where it has it already.
///
/// # Errors
/// The definition has no such disk or does not name its driver, or is none.
pub fn set_error_policy(text: &str, target: &str, policy: &ErrorPolicy) -> Result<String, String> {
    let document = Document::parse(text).map_err(|e| format!("is no XML: {e}"))?;
    let disk = find(&document, target).ok_or_else(|| format!("has no disk {target}"))?;
    let Some(driver) = child(disk, "driver") else {
        return if *policy == ErrorPolicy::default() {
            Ok(text.to_owned())
        } else {
            Err(format!("names no driver for the disk {target}"))
        };
    };
    let mut edits = Vec::new();
    for (name, value) in [("error_policy", &policy.error), ("rerror_policy", &policy.read)] {
        match (value, driver.attribute_node(name)) {
            (Some(value), _) => set_attribute(text, driver, name, value, &mut edits),
            (None, Some(old)) => {
                let before = text.get(..old.range().start).unwrap_or_default().trim_end().len();
                edits.push((before..old.range().end, String::new()));
            }
            (None, None) => {}
        }
    }
    Ok(splice(text, edits))
}

fn find<'a, 'input>(document: &'a Document<'input>, target: &str) -> Option<Node<'a, 'input>> {
    disk_nodes(document.root_element())
        .find(|d| child(*d, "target").and_then(|t| t.attribute("dev")) == Some(target))
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: &str = "<domain><devices>
  <disk><driver name='qemu' type='raw'
      rerror_policy='report' cache='none'/><target dev='vda'/></disk>
  <disk><driver name='qemu'/><target dev='vdb'/></disk>
  <disk><target dev='vdc'/></disk>
</devices></domain>";

    #[test]
    fn a_policy_is_set_and_taken_away_again_without_a_trace() {
        for target in ["vda", "vdb"] {
            let was = error_policy(OLD, target).unwrap();
            assert_eq!(was.read.as_deref(), (target == "vda").then_some("report"));
            let stops = set_error_policy(OLD, target, &ErrorPolicy::stop()).unwrap();
            assert_eq!(error_policy(&stops, target).unwrap(), ErrorPolicy::stop());
            assert!(stops.contains("cache='none'"), "{stops}");
            assert_eq!(set_error_policy(&stops, target, &was).unwrap(), OLD);
            let bare = set_error_policy(&stops, target, &ErrorPolicy::default()).unwrap();
            assert!(!bare.contains("error_policy='stop'"), "{bare}");
        }
    }

    #[test]
    fn a_disk_that_has_no_place_for_a_policy_is_named() {
        assert_eq!(set_error_policy(OLD, "vdc", &ErrorPolicy::default()).as_deref(), Ok(OLD));
        assert!(set_error_policy(OLD, "vdc", &ErrorPolicy::stop()).unwrap_err().contains("vdc"));
        assert!(set_error_policy(OLD, "vdx", &ErrorPolicy::stop()).unwrap_err().contains("vdx"));
        assert_eq!(error_policy(OLD, "vdx"), Ok(ErrorPolicy::default()));
    }
}
