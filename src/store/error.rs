//! What can go wrong with a store, said so that a person knows what to do.

use std::io;
use std::path::{Path, PathBuf};

use super::names::NameError;

/// Result of a store operation.
pub type StoreResult<T> = Result<T, StoreError>;

/// What was being done, on which path, what went wrong, what to do.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The operating system refused.
    #[error("cannot {doing} {}: {}", path.display(), explain(source, path))]
    Io {
        /// What was being done, as it follows "cannot".
        doing: &'static str,
        /// The path.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The folder is not there.
    #[error("cannot open the store {}: {source}; see that its disk is mounted, name another store with -s or KNIBFS_STORE, or make one with `knibfs init {}`", path.display(), path.display())]
    Missing {
        /// The folder.
        path: PathBuf,
        /// Not found.
        source: io::Error,
    },
    /// The folder holds no store.
    #[error("{} is not a knibfs store: it has no knibfs.toml; make one with `knibfs init {}`", path.display(), path.display())]
    NotInitialised {
        /// The folder.
        path: PathBuf,
    },
    /// The path is not a folder.
    #[error("{} is not a folder: name the folder of the store", path.display())]
    NotADirectory {
        /// The path.
        path: PathBuf,
    },
    /// Written by a later knibfs.
    #[error("{} has format {found}, this knibfs reads up to format {known}: use a newer knibfs", path.display())]
    NewerFormat {
        /// The file that says so.
        path: PathBuf,
        /// Its format number.
        found: u64,
        /// The newest that is known.
        known: u64,
    },
    /// `init` over a store.
    #[error("{} already is a knibfs store: nothing was changed", path.display())]
    AlreadyAStore {
        /// The folder.
        path: PathBuf,
    },
    /// `init` over something else.
    #[error("{} is not empty: name a new or an empty folder", path.display())]
    NotEmpty {
        /// The folder.
        path: PathBuf,
    },
    /// The file system cannot keep what a store needs.
    #[error("{} cannot hold a store: {what}", path.display())]
    Unsuitable {
        /// The folder.
        path: PathBuf,
        /// What is missing, and what to mount it with.
        what: String,
    },
    /// A record is missing, cut, altered or makes no sense.
    #[error("{} is damaged: {what}{}", path.display(), advice(path))]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// There is no such thing.
    #[error("there is no {what} \"{name}\" in {}; {advice}", store.display())]
    NotFound {
        /// VM, backup, offering, …
        what: &'static str,
        /// Its name as given.
        name: String,
        /// The store.
        store: PathBuf,
        /// What to do.
        advice: &'static str,
    },
    /// There is one already.
    #[error("there already is {article_what} \"{name}\" in {}: choose another name", store.display())]
    Exists {
        /// With its article: "a VM", "an offering".
        article_what: &'static str,
        /// Its name.
        name: String,
        /// The store.
        store: PathBuf,
    },
    /// Someone else works on it.
    #[error("{what} is in use: {holder}; wait for it to end")]
    Busy {
        /// What is locked.
        what: String,
        /// Who holds it.
        holder: String,
    },
    /// A name that is refused.
    #[error(transparent)]
    Name(#[from] NameError),
    /// A value that is refused.
    #[error("{0}")]
    Invalid(String),
}

fn explain(source: &io::Error, path: &Path) -> String {
    match source.kind() {
        io::ErrorKind::StorageFull => {
            format!(
                "the file system is full: free space where {} lies, then try again",
                parent(path).display()
            )
        }
        io::ErrorKind::QuotaExceeded => "the quota is used up: raise it or free space, then try again".into(),
        io::ErrorKind::ReadOnlyFilesystem => "the file system is read-only: mount it writable".into(),
        io::ErrorKind::PermissionDenied => format!("{source}: run as a user that owns the store"),
        io::ErrorKind::StaleNetworkFileHandle => format!("{source}: mount the file system again"),
        _ => source.to_string(),
    }
}

fn parent(path: &Path) -> &Path {
    path.parent().unwrap_or(path)
}

fn advice(path: &Path) -> &'static str {
    match path.extension().and_then(|e| e.to_str()) {
        Some("sums") => "; the next backup will be full; keep or copy what other backups hold",
        Some("json") => "; copy it from a replica of the store, or run `knibfs recover`",
        _ => "; copy it from a replica of the store",
    }
}

impl StoreError {
    /// For `map_err`: an operating system's error with what was done to which path.
    pub fn io<'a>(doing: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> Self + 'a {
        move |source| Self::Io { doing, path: path.to_path_buf(), source }
    }

    /// A file that is not as it should be.
    pub fn damaged(path: &Path, what: impl Into<String>) -> Self {
        Self::Damaged { path: path.to_path_buf(), what: what.into() }
    }

    /// Whether the error is that something is not there.
    pub fn is_not_found(&self) -> bool {
        match self {
            Self::NotFound { .. } | Self::NotInitialised { .. } => true,
            Self::Io { source, .. } => source.kind() == io::ErrorKind::NotFound,
            _ => false,
        }
    }

    /// Whether the store has no room left.
    pub fn is_full(&self) -> bool {
        matches!(self, Self::Io { source, .. }
            if matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded))
    }
}
