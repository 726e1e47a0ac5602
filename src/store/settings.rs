//! Settings of a store: the table of section 5 of the requirements, names and defaults exact.

use std::collections::BTreeMap;

use super::{Store, StoreError, StoreResult};

/// What a value may be.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
    Bool,
    /// Whole numbers from this one.
    Int(i64),
    /// Not negative, not infinite.
    Real,
}

/// One row of the table.
#[derive(Debug, Clone, Copy)]
pub struct Definition {
    /// Its name.
    pub name: &'static str,
    /// Its default.
    pub default: &'static str,
    /// What it means, with its unit.
    pub meaning: &'static str,
    kind: Kind,
}

macro_rules! table {
    ($($constant:ident = $name:literal, $default:literal, $kind:expr, $meaning:literal;)*) => {
        $(const $constant: &str = $name;)*

        /// Every setting.
        pub const SETTINGS: &[Definition] = &[
            $(Definition { name: $name, default: $default, meaning: $meaning, kind: $kind },)*
        ];
    };
}

table! {
    TASK_ENABLED = "backup.compression.task.enabled", "true", Kind::Bool,
        "whether the scheduler starts compression jobs at all";
    MAX_CONCURRENT = "backup.compression.max.concurrent.compressions.per.host", "5", Kind::Int(-1),
        "compression jobs at once on a host; finalizing ones ignore it; -1 = no limit";
    MAX_RETRIES = "backup.compression.max.job.retries", "2", Kind::Int(0), "attempts of a compression job";
    RETRY_INTERVAL = "backup.compression.retry.interval", "60", Kind::Int(0), "minutes between attempts";
    COMPRESSION_TIMEOUT = "backup.compression.timeout", "28800", Kind::Int(1), "seconds that a compression job may take";
    MINIMUM_FREE = "backup.compression.minimum.free.storage", "1", Kind::Real,
        "a job starts only where the store has this many times the space that the backup occupies free";
    COROUTINES = "backup.compression.coroutines", "1", Kind::Int(1), "worker threads of one compression job";
    RATE_LIMIT = "backup.compression.rate.limit", "0", Kind::Real, "MB/s of a compression job; below 1 = none";
    CHAIN_SIZE = "backup.chain.size", "8", Kind::Int(i64::MIN),
        "backups in a chain; 1 = every backup is full; below 1 = unlimited";
    TIMEOUT = "knib.timeout", "43200", Kind::Int(1), "seconds that an operation on a VM may take";
}

/// The settings as they are now.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    values: BTreeMap<String, String>,
}

impl Settings {
    /// The value as text; the default when it was not set. `None`: there is no such setting.
    pub fn get(&self, name: &str) -> Option<&str> {
        let row = SETTINGS.iter().find(|d| d.name == name)?;
        Some(self.values.get(name).map_or(row.default, String::as_str))
    }

    /// `backup.chain.size`: backups in a chain; below 1 is unlimited.
    pub fn chain_size(&self) -> i64 {
        self.int(CHAIN_SIZE)
    }

    /// `backup.compression.task.enabled`.
    pub fn compression_enabled(&self) -> bool {
        self.get(TASK_ENABLED) == Some("true")
    }

    /// `backup.compression.max.concurrent.compressions.per.host`; none is no limit.
    pub fn max_concurrent_compressions(&self) -> Option<u64> {
        u64::try_from(self.int(MAX_CONCURRENT)).ok()
    }

    /// `backup.compression.max.job.retries`.
    pub fn compression_attempts(&self) -> u64 {
        self.int(MAX_RETRIES).unsigned_abs()
    }

    /// `backup.compression.retry.interval`, in minutes.
    pub fn compression_retry_minutes(&self) -> u64 {
        self.int(RETRY_INTERVAL).unsigned_abs()
    }

    /// `backup.compression.timeout`, in seconds.
    pub fn compression_timeout(&self) -> u64 {
        self.int(COMPRESSION_TIMEOUT).unsigned_abs()
    }

    /// `backup.compression.minimum.free.storage`: times the backup's size.
    pub fn minimum_free_factor(&self) -> f64 {
        self.real(MINIMUM_FREE)
    }

    /// `backup.compression.coroutines`: worker threads.
    pub fn compression_threads(&self) -> usize {
        usize::try_from(self.int(COROUTINES)).unwrap_or(1).max(1)
    }

    /// `backup.compression.rate.limit` in bytes a second; none when there is no limit.
    pub fn compression_rate(&self) -> Option<u64> {
        let megabytes = self.real(RATE_LIMIT);
        #[allow(clippy::cast_sign_loss)] // not negative: checked when it was set
        (megabytes >= 1.0).then_some((megabytes * 1e6) as u64)
    }

    /// `knib.timeout`, in seconds.
    pub fn timeout(&self) -> u64 {
        self.int(TIMEOUT).unsigned_abs()
    }

    fn int(&self, name: &str) -> i64 {
        self.get(name).and_then(|v| v.parse().ok()).unwrap_or_default()
    }

    fn real(&self, name: &str) -> f64 {
        self.get(name).and_then(|v| v.parse().ok()).unwrap_or_default()
    }
}

/// The value as it is to be kept, or why it cannot be.
fn check(row: &Definition, value: &str) -> Result<String, String> {
    let refuse = |wanted: &str| Err(format!("{} cannot be \"{value}\": it takes {wanted}", row.name));
    match row.kind {
        Kind::Bool => match value.to_ascii_lowercase().as_str() {
            truth @ ("true" | "false") => Ok(truth.into()),
            _ => refuse("true or false"),
        },
        Kind::Int(least) => match value.parse::<i64>() {
            Ok(number) if number >= least => Ok(number.to_string()),
            _ if least == i64::MIN => refuse("a whole number"),
            _ => refuse(&format!("a whole number from {least}")),
        },
        Kind::Real => match value.parse::<f64>() {
            Ok(number) if number.is_finite() && number >= 0.0 => Ok(number.to_string()),
            _ => refuse("a number from 0"),
        },
    }
}

fn row(name: &str) -> StoreResult<&'static Definition> {
    SETTINGS.iter().find(|d| d.name == name).ok_or_else(|| {
        StoreError::Invalid(format!(
            "there is no setting \"{name}\"; `knibfs setting list` shows those that are"
        ))
    })
}

impl Store {
    /// The settings, read anew: a change takes effect without a restart.
    pub fn settings(&self) -> StoreResult<Settings> {
        let values = self.config()?.settings;
        for (name, value) in &values {
            // The file may have been edited by hand, or written by a later version with more settings.
            if let Some(row) = SETTINGS.iter().find(|d| d.name == name) {
                check(row, value)
                    .map_err(|what| StoreError::damaged(&self.root().join("knibfs.toml"), what))?;
            }
        }
        Ok(Settings { values })
    }

    /// One setting's value as text.
    pub fn setting(&self, name: &str) -> StoreResult<String> {
        let row = row(name)?;
        Ok(self.settings()?.get(name).unwrap_or(row.default).to_owned())
    }

    /// Changes a setting.
    pub fn set_setting(&self, name: &str, value: &str) -> StoreResult<()> {
        let value = check(row(name)?, value).map_err(StoreError::Invalid)?;
        let _lock = self.lock_config()?;
        let mut config = self.config()?;
        config.settings.insert(name.into(), value);
        self.save_config(&config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store() -> (tempfile::TempDir, Store) {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::init(&dir.path().join("s"), false).unwrap();
        (dir, store)
    }

    #[test]
    fn a_new_store_has_the_table_s_defaults() {
        let settings = store().1.settings().unwrap();
        assert_eq!(settings.chain_size(), 8);
        assert!(settings.compression_enabled());
        assert_eq!(settings.max_concurrent_compressions(), Some(5));
        assert_eq!(settings.compression_attempts(), 2);
        assert_eq!(settings.compression_retry_minutes(), 60);
        assert_eq!(settings.compression_timeout(), 28_800);
        assert!((settings.minimum_free_factor() - 1.0).abs() < f64::EPSILON);
        assert_eq!(settings.compression_threads(), 1);
        assert_eq!(settings.compression_rate(), None);
        assert_eq!(settings.timeout(), 43_200);
        assert_eq!(SETTINGS.len(), 10);
    }

    #[test]
    fn a_changed_setting_is_seen_by_whoever_has_the_store_open() {
        let (_dir, store) = store();
        let other = Store::open(store.root()).unwrap();
        store.set_setting("backup.chain.size", "-1").unwrap();
        store.set_setting("backup.compression.rate.limit", "12.5").unwrap();
        store.set_setting("backup.compression.max.concurrent.compressions.per.host", "-1").unwrap();
        let settings = other.settings().unwrap();
        assert_eq!(settings.chain_size(), -1);
        assert_eq!(settings.compression_rate(), Some(12_500_000));
        assert_eq!(settings.max_concurrent_compressions(), None);
    }

    #[test]
    fn a_value_that_makes_no_sense_is_refused_and_changes_nothing() {
        let (_dir, store) = store();
        for (name, value) in [
            ("backup.chain.size", "many"),
            ("backup.chain.size", "3.5"),
            ("backup.compression.task.enabled", "perhaps"),
            ("backup.compression.coroutines", "0"),
            ("backup.compression.minimum.free.storage", "-1"),
            ("backup.compression.minimum.free.storage", "NaN"),
            ("backup.compression.max.concurrent.compressions.per.host", "-2"),
            ("knib.timeout", "0"),
            ("no.such.setting", "1"),
        ] {
            assert!(store.set_setting(name, value).is_err(), "{name} = {value} was taken");
        }
        assert!(store.config().unwrap().settings.is_empty());
    }
}
