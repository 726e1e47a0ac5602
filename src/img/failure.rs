//! How a command of `img` ends when it does not succeed.

/// What is said on standard error, and the exit code.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// Exit code.
    pub code: u8,
    /// One sentence or more.
    pub text: String,
    /// Whether the command's help is pointed to.
    pub usage: bool,
}

impl Failure {
    /// It could not be done: exit 1, as every command of `qemu-img` ends.
    pub fn new(text: impl Into<String>) -> Self {
        Self { code: 1, text: text.into(), usage: false }
    }

    /// The line makes no sense: exit 1 too, and the help is pointed to.
    pub fn usage(text: impl Into<String>) -> Self {
        Self { code: 1, text: text.into(), usage: true }
    }

    /// The same with another exit code.
    #[must_use]
    pub fn with_code(self, code: u8) -> Self {
        Self { code, ..self }
    }
}

impl From<knib_qcow::Error> for Failure {
    fn from(error: knib_qcow::Error) -> Self {
        Self::new(error.to_string())
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        Self::new(error.to_string())
    }
}
