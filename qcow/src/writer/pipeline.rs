//! Workers that take jobs in guest order, and a consumer that gets their results in the same order.
//! Memory: at most `4 * threads + 4` results of about [`JOB_BYTES`] wait at once.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use crate::writer::{Control, Run, Source};
use crate::{Error, Result};

/// Guest bytes in one job (one cluster, if that is more).
pub(super) const JOB_BYTES: u64 = 1 << 20;

struct State<T> {
    from: u64,
    taken: u64,
    consumed: u64,
    last: Option<u64>,
    results: BTreeMap<u64, Result<(T, Run)>>,
    stop: bool,
}

/// Has `make` called for every job by `control.threads` workers (each with its own `new_worker`), and `take` with each
/// result in guest order by the calling thread.
pub(crate) fn run<S: Source, W, T: Send>(
    source: &S,
    cluster: u64,
    control: &Control,
    new_worker: impl Fn() -> Result<W> + Sync,
    make: impl Fn(&mut W, Run) -> Result<T> + Sync,
    mut take: impl FnMut(T) -> Result<()>,
) -> Result<()> {
    let threads = control.threads.max(1);
    let window = 4 * threads as u64 + 4;
    let state = Mutex::new(State {
        from: 0,
        taken: 0,
        consumed: 0,
        last: None,
        results: BTreeMap::new(),
        stop: false,
    });
    let (room, ready) = (Condvar::new(), Condvar::new());
    let job_len = JOB_BYTES.max(cluster) / cluster * cluster;
    let work = || {
        let mut worker = new_worker();
        loop {
            let mut s = state.lock();
            while !s.stop && s.last.is_none() && s.taken >= s.consumed + window {
                room.wait(&mut s);
            }
            if s.stop || s.last.is_some() {
                return;
            }
            let seq = s.taken;
            let next = source.next(s.from);
            let run = match next {
                Ok(Some(run)) if run.len > 0 && run.start >= s.from => run,
                Ok(Some(run)) => {
                    let what = format!("a source went backwards, to {}", run.start);
                    return finish(
                        &mut s,
                        &ready,
                        seq,
                        Err(Error::out_of_range(std::path::Path::new("source"), what)),
                    );
                }
                Ok(None) => {
                    s.last = Some(seq);
                    ready.notify_all();
                    room.notify_all();
                    return;
                }
                Err(e) => return finish(&mut s, &ready, seq, Err(e)),
            };
            // Zeros cost nothing, so a run of them is one job unless it is very long.
            let most = if run.zero { job_len.saturating_mul(1024) } else { job_len };
            let run = Run { len: run.len.min(most), ..run };
            s.from = run.start + run.len;
            s.taken += 1;
            drop(s);
            let made = match &mut worker {
                Ok(worker) => make(worker, run).map(|t| (t, run)),
                Err(_) => Err(Error::Cancelled),
            };
            let made = match (&worker, made) {
                (Err(e), _) => Err(Error::out_of_range(std::path::Path::new("worker"), e.to_string())),
                (_, made) => made,
            };
            let mut s = state.lock();
            s.results.insert(seq, made);
            ready.notify_all();
        }
    };
    let begun = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(work);
        }
        let (mut result, mut copied) = (Ok(()), 0);
        loop {
            let mut s = state.lock();
            let next = loop {
                if control.cancel.load(Ordering::Relaxed) {
                    break Some(Err(Error::Cancelled));
                }
                let seq = s.consumed;
                if let Some(r) = s.results.remove(&seq) {
                    s.consumed += 1;
                    room.notify_all();
                    break Some(r);
                }
                if s.last == Some(seq) {
                    break None;
                }
                ready.wait_for(&mut s, Duration::from_millis(200));
            };
            drop(s);
            match next {
                None => break,
                Some(r) => {
                    if let Err(e) = r.and_then(|(t, run)| {
                        take(t)?;
                        (control.progress)(run.start + run.len);
                        // Holes and zeros are no work, so they are not paced.
                        copied += if run.zero { 0 } else { run.len };
                        control.pace(begun, copied)
                    }) {
                        result = Err(e);
                        break;
                    }
                }
            }
        }
        state.lock().stop = true;
        room.notify_all();
        result
    })
}

fn finish<T>(s: &mut State<T>, ready: &Condvar, seq: u64, result: Result<(T, Run)>) {
    s.results.insert(seq, result);
    s.taken += 1;
    s.stop = true;
    ready.notify_all();
}
