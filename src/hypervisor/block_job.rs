//! Block jobs of a domain that runs: start, look, end.
//!
//! The `virt` crate (0.5) has no calls for block jobs, and this program calls no C library by itself; so these four
//! calls, and only they, go through libvirt's own `virsh`. Its answers are asked for in the C locale.

use std::process::{Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};

use super::{HypervisorError, Result, limit};

/// Where the disk is.
pub(super) struct Disk<'a> {
    pub uri: &'a str,
    /// The domain's UUID: names may be numbers, which virsh would take for ids.
    pub uuid: &'a str,
    pub target: &'a str,
}

/// A job as libvirt reports it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct JobInfo {
    /// libvirt's word for it: `Block Commit`, `Active Block Commit`.
    pub kind: String,
    /// Bytes done.
    pub done: u64,
    /// Bytes to do.
    pub total: u64,
}

/// What to merge: `path`, or libvirt's `target[index]`, which is exact.
pub(super) struct Commit<'a> {
    pub top: &'a str,
    pub base: &'a str,
    pub active: bool,
    /// Bytes per second.
    pub rate_limit: Option<u64>,
}

impl Disk<'_> {
    /// Starts a commit; returns once it runs.
    pub fn start_commit(&self, commit: &Commit<'_>) -> Result<std::result::Result<(), String>> {
        let mut args = vec!["blockcommit", self.uuid, self.target, "--base", commit.base];
        if commit.active {
            args.push("--active");
        } else {
            args.extend(["--top", commit.top]);
        }
        let rate = commit.rate_limit.filter(|r| *r > 0).map(|r| r.to_string());
        if let Some(rate) = &rate {
            args.extend(["--bandwidth", rate, "--bytes"]);
        }
        Ok(self.virsh(&args)?.map(drop))
    }

    /// Starts pulling all backing files' data into the live image; returns once it runs.
    pub fn start_pull(&self, rate_limit: Option<u64>) -> Result<std::result::Result<(), String>> {
        let mut args = vec!["blockpull", self.uuid, self.target];
        let rate = rate_limit.filter(|r| *r > 0).map(|r| r.to_string());
        if let Some(rate) = &rate {
            args.extend(["--bandwidth", rate, "--bytes"]);
        }
        Ok(self.virsh(&args)?.map(drop))
    }

    /// The job that runs on the disk.
    pub fn job(&self) -> Result<std::result::Result<Option<JobInfo>, String>> {
        Ok(self.virsh(&["blockjob", self.uuid, self.target, "--info", "--raw"])?.map(|text| parse(&text)))
    }

    /// Ends an active commit that is ready: the disk goes on in the base.
    pub fn pivot(&self) -> Result<std::result::Result<(), String>> {
        Ok(self.virsh(&["blockjob", self.uuid, self.target, "--pivot"])?.map(drop))
    }

    /// Ends a job and leaves the chain as it is.
    pub fn abort(&self) -> Result<std::result::Result<(), String>> {
        Ok(self.virsh(&["blockjob", self.uuid, self.target, "--abort"])?.map(drop))
    }

    /// Its output, or its complaint.
    fn virsh(&self, args: &[&str]) -> Result<std::result::Result<String, String>> {
        let child = Command::new("virsh")
            .args(["-q", "-c", self.uri])
            .args(args)
            .env("LC_ALL", "C")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|why| HypervisorError::NoVirsh { why })?;
        let pid = Pid::from_child(&child);
        let doing = format!("ask for {} of a disk", args.first().unwrap_or(&"a job"));
        let ended = limit::within(limit::of_a_call(), self.uri, &doing, move || child.wait_with_output());
        if ended.is_err() {
            // It must not do later what nobody waits for.
            let _ = kill_process(pid, Signal::KILL);
        }
        let output = ended?.map_err(|why| HypervisorError::NoVirsh { why })?;
        if output.status.success() {
            return Ok(Ok(String::from_utf8_lossy(&output.stdout).into_owned()));
        }
        let text = String::from_utf8_lossy(&output.stderr);
        let lines: Vec<_> = text.lines().map(|l| l.trim_start_matches("error: ").trim()).collect();
        let words = lines.into_iter().filter(|l| !l.is_empty()).collect::<Vec<_>>().join("; ");
        Ok(Err(if words.is_empty() { format!("virsh ended with {}", output.status) } else { words }))
    }
}

/// Reads the lines `type=`, `cur=` and `end=`; no `type=` is no job.
fn parse(text: &str) -> Option<JobInfo> {
    let value = |key: &str| text.lines().find_map(|l| l.trim().strip_prefix(key)?.strip_prefix('='));
    let number = |key: &str| value(key).and_then(|v| v.parse().ok()).unwrap_or(0);
    Some(JobInfo { kind: value("type")?.to_owned(), done: number("cur"), total: number("end") })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_is_read() {
        let text = " type=Active Block Commit\n bandwidth=1\n cur=65536\n end=1048576\n";
        let job = JobInfo { kind: "Active Block Commit".into(), done: 65536, total: 1_048_576 };
        assert_eq!(parse(text), Some(job));
    }

    #[test]
    fn nothing_is_no_job() {
        assert_eq!(parse("\n"), None);
        assert_eq!(parse(""), None);
    }
}
