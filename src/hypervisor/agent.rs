//! The guest agent: ping, freeze, thaw, each with a bound.
//!
//! Commands go through libvirt, which resynchronises with the agent after one that timed out. Protocol:
//! QEMU's docs/interop/qemu-ga-ref.

use std::time::{Duration, Instant};

use serde_json::Value;
use virt::domain::Domain;
use virt::error::{Error, ErrorNumber};

use super::{HypervisorError, Result, limit};

/// One try of a thaw may take so long.
const THAW_TRY: Duration = Duration::from_secs(10);

/// libvirt itself answers within this when an agent's time is up.
const LIBVIRT: Duration = Duration::from_secs(30);

/// The agent of a domain that runs.
pub(super) struct Agent {
    /// The host.
    pub uri: String,
    pub domain: Domain,
    /// For errors.
    pub name: String,
}

/// Why an agent gave no answer.
struct NoAnswer {
    why: String,
    timeout: bool,
}

impl Agent {
    fn command(&self, name: &str, limit: Duration) -> std::result::Result<Value, NoAnswer> {
        // libvirt counts in whole seconds; 0 would mean "do not wait".
        let seconds = i32::try_from(limit.as_secs().max(1)).unwrap_or(i32::MAX);
        let (domain, command) = (self.domain.clone(), format!(r#"{{"execute":"{name}"}}"#));
        let asked = limit::within(limit + LIBVIRT, &self.uri, "ask the guest agent", move || {
            domain.qemu_agent_command(&command, seconds, 0)
        });
        let answer = asked
            .map_err(|e| NoAnswer { why: e.to_string(), timeout: true })?
            .map_err(|e| NoAnswer { timeout: is_timeout(&e), why: e.message().to_owned() })?;
        let value: Value = serde_json::from_str(&answer).unwrap_or(Value::Null);
        Ok(value.get("return").cloned().unwrap_or(Value::Null))
    }

    /// Whether it answers.
    pub fn ping(&self, limit: Duration) -> Result<()> {
        self.command("guest-ping", limit).map(drop).map_err(|e| self.missing(&e.why))
    }

    fn missing(&self, why: &str) -> HypervisorError {
        HypervisorError::AgentMissing { domain: self.name.clone(), why: why.to_owned() }
    }

    /// Freezes all file systems; how many. After an error the guest may be frozen all the same.
    pub fn freeze(&self, limit: Duration) -> std::result::Result<u64, String> {
        match self.command("guest-fsfreeze-freeze", limit) {
            Ok(count) => count.as_u64().ok_or_else(|| format!("the agent answered {count}")),
            Err(e) if e.timeout => Err(format!("no answer within {} s", limit.as_secs())),
            Err(e) => Err(e.why),
        }
    }

    /// Thaws all file systems and tries until the agent confirms it or `limit` is over; how many were frozen.
    pub fn thaw(&self, limit: Duration) -> std::result::Result<u64, String> {
        let end = Instant::now() + limit;
        loop {
            match self.command("guest-fsfreeze-thaw", THAW_TRY.min(limit)) {
                Ok(count) => return Ok(count.as_u64().unwrap_or(0)),
                // A guest that is gone is not frozen; one that does not answer may be.
                Err(e) if !self.is_off() => {
                    if Instant::now() >= end {
                        return Err(e.why);
                    }
                    std::thread::sleep(Duration::from_millis(200));
                }
                Err(_) => return Ok(0),
            }
        }
    }

    fn is_off(&self) -> bool {
        let domain = self.domain.clone();
        let asked = limit::within(LIBVIRT, &self.uri, "look at the state", move || domain.is_active());
        matches!(asked, Ok(Ok(false)))
    }
}

fn is_timeout(error: &Error) -> bool {
    error.code().is_any(vec![
        ErrorNumber::AgentCommandTimeout,
        ErrorNumber::AgentUnresponsive,
        ErrorNumber::OperationTimeout,
    ])
}
