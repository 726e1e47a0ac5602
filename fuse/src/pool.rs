//! Threads that are started when there is work for them, up to so many, and wait for more.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use parking_lot::{Condvar, Mutex};

pub(crate) type Job = Box<dyn FnOnce() + Send>;

/// Does jobs in the order in which they come, several at a time.
pub(crate) struct Pool {
    name: &'static str,
    most: usize,
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

#[derive(Default)]
struct Shared {
    queue: Mutex<Queue>,
    bell: Condvar,
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    idle: usize,
    closed: bool,
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Pool")
    }
}

impl Pool {
    /// A pool of at most so many threads, none of which is started yet.
    pub fn new(name: &'static str, most: usize) -> Self {
        Self { name, most, shared: Arc::default(), threads: Mutex::default() }
    }

    /// Has it done soon; gives it back when there is no thread for it, now or later.
    pub fn run(&self, job: Job) -> Result<(), Job> {
        self.run_within(usize::MAX, job)
    }

    /// The same; it is given back, too, where so many wait already.
    pub fn run_within(&self, most_waiting: usize, job: Job) -> Result<(), Job> {
        let mut queue = self.shared.queue.lock();
        if self.most == 0 || queue.jobs.len() >= most_waiting {
            return Err(job);
        }
        // A thread that is busy will come to it, if there is one.
        if queue.idle <= queue.jobs.len() && !self.start_one() && self.threads.lock().is_empty() {
            return Err(job);
        }
        queue.jobs.push_back(job);
        drop(queue);
        self.shared.bell.notify_one();
        Ok(())
    }

    fn start_one(&self) -> bool {
        let mut threads = self.threads.lock();
        if threads.len() >= self.most {
            return false;
        }
        let shared = self.shared.clone();
        let named = thread::Builder::new().name(format!("{}-{}", self.name, threads.len()));
        named.spawn(move || shared.work()).map(|thread| threads.push(thread)).is_ok()
    }
}

impl Drop for Pool {
    /// Waits until all that it took on is done.
    fn drop(&mut self) {
        self.shared.queue.lock().closed = true;
        self.shared.bell.notify_all();
        for thread in self.threads.get_mut().drain(..) {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn work(&self) {
        let mut queue = self.queue.lock();
        loop {
            if let Some(job) = queue.jobs.pop_front() {
                drop(queue);
                if catch_unwind(AssertUnwindSafe(job)).is_err() {
                    tracing::error!("a thread of the mount panicked: please report this as a bug");
                }
                queue = self.queue.lock();
            } else if queue.closed {
                return;
            } else {
                queue.idle += 1;
                self.bell.wait(&mut queue);
                queue.idle -= 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn all_is_done_by_as_many_threads_at_once_as_there_may_be() {
        let pool = Pool::new("test", 8);
        let all_there = Arc::new(Barrier::new(9));
        let done = Arc::new(AtomicUsize::new(0));
        let run = |wait: bool| {
            let (all_there, done) = (all_there.clone(), done.clone());
            let job = move || {
                if wait {
                    all_there.wait();
                }
                done.fetch_add(1, Ordering::Relaxed);
            };
            assert!(pool.run(Box::new(job)).is_ok());
        };
        (0..8).for_each(|_| run(true));
        // All wait for each other, so none of them waits for another's end.
        all_there.wait();
        (0..100).for_each(|_| run(false));
        assert!(pool.run(Box::new(|| panic!("on purpose"))).is_ok());
        run(false);
        assert_eq!(pool.threads.lock().len(), 8);
        drop(pool);
        assert_eq!(done.load(Ordering::Relaxed), 109);
    }

    #[test]
    fn where_enough_wait_the_job_is_given_back() {
        let pool = Pool::new("test", 1);
        let (busy, go_on) = (Arc::new(Barrier::new(2)), Arc::new(Barrier::new(2)));
        let (its_busy, its_go_on) = (busy.clone(), go_on.clone());
        let long = move || {
            its_busy.wait();
            its_go_on.wait();
        };
        assert!(pool.run_within(1, Box::new(long)).is_ok());
        busy.wait();
        assert!(pool.run_within(1, Box::new(|| {})).is_ok());
        assert!(pool.run_within(1, Box::new(|| {})).is_err());
        assert!(pool.run(Box::new(|| {})).is_ok());
        go_on.wait();
    }

    #[test]
    fn where_there_may_be_no_thread_the_job_is_given_back() {
        assert!(Pool::new("test", 0).run(Box::new(|| {})).is_err());
    }
}
