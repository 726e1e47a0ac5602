//! How long the guest's writes stand still while something is done to its disks.

use std::time::Duration;

use super::guest::Guest;

/// What fio saw in the guest.
#[derive(Debug, Clone, Copy)]
pub struct Stall {
    /// The longest write.
    pub longest: Duration,
    /// Writes that were made.
    pub writes: u64,
    /// Writes that failed: the guest saw an I/O error.
    pub errors: u64,
}

/// Runs fio in the guest, 4 KiB writes one after the other straight to a file on `folder`, from before `work` begins
/// until after it ends. `work` gets a guest that has already written.
pub fn measure<T>(guest: &Guest, folder: &str, work: impl FnOnce() -> T) -> (T, Stall) {
    let file = format!("{folder}/stall");
    let command = format!(
        "exec fio --name=stall --filename={file} --size=16m --rw=randwrite --bs=4k --direct=1 --iodepth=1 \
         --ioengine=psync --time_based --runtime=600 --continue_on_error=write --output-format=json \
         --output=/tmp/stall.json"
    );
    guest.sh("rm -f /tmp/stall.json");
    let fio = guest.begin(&["/bin/sh", "-c", &command], b"");
    // fio lays the file out first; then the disk's counter of writes goes on and on.
    let written = || {
        let disk = folder.rsplit('/').next().unwrap_or_default();
        let said = guest.sh(&format!("cat /sys/block/{disk}/stat"));
        said.split_whitespace().nth(4).and_then(|n| n.parse::<u64>().ok()).unwrap_or(0)
    };
    let before = written();
    guest.wait("fio to write", || written() > before + 4200);
    let result = work();
    let after = written();
    guest.wait("fio to go on", || written() > after + 20);
    // SIGINT makes fio stop, and report.
    guest.sh(&format!("kill -INT {fio}"));
    let said = guest.finish(fio);
    let report = guest.read("/tmp/stall.json");
    let text = String::from_utf8_lossy(&report);
    let json = text.get(text.find('{').unwrap_or(0)..).unwrap_or_default();
    let report: serde_json::Value =
        serde_json::from_str(json).unwrap_or_else(|e| panic!("fio's report: {e}: {text} {said:?}"));
    let job = &report["jobs"][0];
    let write = &job["write"];
    let stall = Stall {
        longest: Duration::from_nanos(write["clat_ns"]["max"].as_f64().unwrap_or_default() as u64),
        writes: write["total_ios"].as_u64().unwrap_or(0),
        errors: job["total_err"].as_u64().unwrap_or(0),
    };
    (result, stall)
}
