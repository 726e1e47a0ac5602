//! The hosts that quick restores may start VMs on: libvirt URIs with names. Kept by this host, not in the store.

use serde::{Deserialize, Serialize};

use super::{Record, Store, StoreError, StoreResult, record};

/// One host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Host {
    /// Its name.
    pub name: String,
    /// Its libvirt.
    pub uri: String,
    /// Its zone.
    #[serde(default)]
    pub zone: Option<String>,
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct Hosts {
    hosts: Vec<Host>,
}

impl Record for Hosts {
    const FORMAT: u64 = 1;
}

impl Store {
    fn hosts_path(&self) -> std::path::PathBuf {
        self.state_dir().join("hosts.json")
    }

    /// All hosts, by name.
    pub fn hosts(&self) -> StoreResult<Vec<Host>> {
        let path = self.hosts_path();
        if !path.exists() {
            return Ok(Vec::new());
        }
        Ok(record::read::<Hosts>(&path)?.hosts)
    }

    /// The host of that name.
    pub fn host(&self, name: &str) -> StoreResult<Host> {
        self.hosts()?.into_iter().find(|h| h.name == name).ok_or_else(|| self.no_host(name))
    }

    fn no_host(&self, name: &str) -> StoreError {
        StoreError::NotFound {
            what: "host",
            name: name.into(),
            store: self.root().to_path_buf(),
            advice: "`knibfs host list` shows those that are, `knibfs host add` adds one",
        }
    }

    /// Adds a host; refused when the name is taken.
    pub fn add_host(&self, host: Host) -> StoreResult<()> {
        if host.name.is_empty() || host.name.len() > 255 || host.name.chars().any(char::is_control) {
            return Err(StoreError::Invalid(
                "a host's name is not empty, at most 255 bytes long and has no control characters".into(),
            ));
        }
        if host.uri.is_empty() || host.uri.chars().any(|c| c.is_control() || c.is_whitespace()) {
            return Err(StoreError::Invalid(format!(
                "\"{}\" is no libvirt URI: write it as qemu:///system",
                host.uri.escape_debug()
            )));
        }
        let _lock = self.lock_config()?;
        let mut hosts = self.hosts()?;
        if hosts.iter().any(|h| h.name == host.name) {
            return Err(StoreError::Exists {
                article_what: "a host",
                name: host.name,
                store: self.root().to_path_buf(),
            });
        }
        hosts.push(host);
        hosts.sort_by(|a, b| a.name.cmp(&b.name));
        self.save_hosts(hosts)
    }

    /// Forgets a host.
    pub fn remove_host(&self, name: &str) -> StoreResult<Host> {
        let _lock = self.lock_config()?;
        let mut hosts = self.hosts()?;
        let at = hosts.iter().position(|h| h.name == name).ok_or_else(|| self.no_host(name))?;
        let removed = hosts.remove(at);
        self.save_hosts(hosts)?;
        Ok(removed)
    }

    fn save_hosts(&self, hosts: Vec<Host>) -> StoreResult<()> {
        let dir = self.state_dir();
        std::fs::create_dir_all(dir).map_err(StoreError::io("create the folder", dir))?;
        record::write(&self.hosts_path(), &Hosts { hosts })
    }
}

#[cfg(test)]
mod tests {
    use super::super::layout::tests::store_with_vm;
    use super::*;

    #[test]
    fn a_host_is_known_by_its_name_until_it_is_removed() {
        let (_dir, store, _) = store_with_vm();
        let host = |name: &str, uri: &str| Host { name: name.into(), uri: uri.into(), zone: None };
        assert_eq!(store.hosts().unwrap(), []);
        store.add_host(host("b", "qemu:///system")).unwrap();
        store.add_host(host("a", "qemu:///session")).unwrap();
        let names: Vec<_> = store.hosts().unwrap().into_iter().map(|h| h.name).collect();
        assert_eq!(names, ["a", "b"]);
        assert_eq!(store.host("b").unwrap().uri, "qemu:///system");
        assert!(store.add_host(host("b", "x")).unwrap_err().to_string().contains("already is a host"));
        for bad in [host("", "x"), host("c", ""), host("c", "qemu: x"), host("c\n", "x")] {
            assert!(store.add_host(bad).is_err());
        }
        store.remove_host("b").unwrap();
        assert!(store.host("b").unwrap_err().is_not_found());
        assert!(store.remove_host("b").unwrap_err().is_not_found());
    }
}
