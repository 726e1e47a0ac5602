//! The files and folders that are open now.

use std::collections::HashMap;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use parking_lot::{Condvar, Mutex, RwLock};

use crate::{DirEntry, File, FsError, FsResult, Ino, Link, ToKeeper};

/// Who holds a file open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Holder {
    /// The process that opened it; 0 for the kernel (an NFS server).
    pub pid: u32,
    /// The file.
    pub ino: Ino,
}

/// The open files of a mount.
#[derive(Default)]
pub struct OpenFiles {
    files: RwLock<HashMap<u64, Opened>>,
    /// Open since before this server, and not opened again yet: what they are on could not be read.
    missing: RwLock<HashMap<u64, Missing>>,
    /// Who is told what is opened and closed, so that the next server knows it.
    keeper: Option<Keeper>,
    closed: Mutex<u64>,
    bell: Condvar,
}

struct Opened {
    file: Arc<dyn File>,
    holder: Holder,
    /// What the kernel reads by itself.
    backing: Option<u32>,
}

#[derive(Clone, Copy)]
struct Missing {
    holder: Holder,
    backing: Option<u32>,
}

/// What the kernel reads in place of a handle's file.
type Answer = (u64, Option<u32>);

/// Who holds the mount, as a server sees it.
struct Keeper {
    link: Arc<Link>,
    /// Held from the decision how the kernel reads a file until that is noted.
    answers: Mutex<Receiver<Answer>>,
    /// None when the keeper is gone.
    ear: Mutex<Option<Sender<Answer>>>,
}

impl Keeper {
    /// Asks it to have the kernel read a file by itself. It holds what the kernel then knows the file by: that outlives this server.
    fn ask(
        &self,
        answers: &Receiver<Answer>,
        handle: u64,
        holder: Holder,
        file: BorrowedFd<'_>,
    ) -> Option<u32> {
        let Holder { pid, ino } = holder;
        self.link.tell(&ToKeeper::Back { handle, ino: ino.0, pid }, Some(file));
        answers.iter().find(|(of, _)| *of == handle)?.1
    }
}

impl std::fmt::Debug for OpenFiles {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.holders()).finish()
    }
}

impl OpenFiles {
    /// None yet, in a mount that a keeper holds.
    pub(crate) fn told_to(keeper: Arc<Link>) -> Self {
        let (ear, answers) = channel();
        let keeper = Keeper { link: keeper, answers: Mutex::new(answers), ear: Mutex::new(Some(ear)) };
        Self { keeper: Some(keeper), ..Self::default() }
    }

    /// Who holds what, each once, in order.
    pub fn holders(&self) -> Vec<Holder> {
        let mut found: Vec<_> = self.files.read().values().map(|o| o.holder).collect();
        found.extend(self.missing.read().values().map(|m| m.holder));
        found.sort_unstable();
        found.dedup();
        found
    }

    /// Whether none is open.
    pub fn is_empty(&self) -> bool {
        self.files.read().is_empty() && self.missing.read().is_empty()
    }

    /// Waits until a file is closed or the time is up.
    pub fn wait_for_close(&self, patience: std::time::Duration) {
        let mut closed = self.closed.lock();
        if self.is_empty() {
            return;
        }
        self.bell.wait_for(&mut closed, patience);
    }

    /// Adds an opened file. The keeper knows it before the kernel does: what was opened outlives this server.
    pub(crate) fn add(&self, handle: u64, file: Arc<dyn File>, holder: Holder, backing: Option<u32>) {
        if let Some(keeper) = &self.keeper {
            let opened = ToKeeper::Opened { handle, ino: holder.ino.0, pid: holder.pid, backing };
            keeper.link.tell(&opened, file.lock());
        }
        if backing.is_some() {
            file.passed_through();
        }
        self.files.write().insert(handle, Opened { file, holder, backing });
        self.missing.write().remove(&handle);
    }

    /// The same for a file that is opened now. What the kernel reads in its place, where it has a backing and the kernel takes it.
    ///
    /// The kernel has one way to read a node for all who have it open, and fails what is opened in the other. It leaves a way
    /// before it says that a file is closed, so the handles that are here are never fewer than it has.
    pub(crate) fn open(&self, handle: u64, file: Arc<dyn File>, holder: Holder) -> Option<u32> {
        let (Some(keeper), Some(from)) = (&self.keeper, file.backing()) else {
            self.add(handle, file, holder, None);
            return None;
        };
        let answers = keeper.answers.lock();
        let others = self.backings_of(holder.ino, handle);
        let passed = others.iter().find_map(|backing| *backing);
        let backing = if others.is_empty() || passed.is_some() {
            // Asked also where others have it open, which may be closed meanwhile. Without a keeper none is closed any more.
            keeper.ask(&answers, handle, holder, from).or(passed)
        } else {
            None
        };
        self.add(handle, file, holder, backing);
        backing
    }

    /// How the kernel reads the other handles on a node.
    fn backings_of(&self, ino: Ino, but: u64) -> Vec<Option<u32>> {
        let is_other = |handle: u64, holder: &Holder| handle != but && holder.ino == ino;
        let (files, missing) = (self.files.read(), self.missing.read());
        let open = files.iter().filter(|(handle, o)| is_other(**handle, &o.holder)).map(|(_, o)| o.backing);
        let missing = missing.iter().filter(|(handle, m)| is_other(**handle, &m.holder));
        open.chain(missing.map(|(_, m)| m.backing)).collect()
    }

    /// The keeper has said what the kernel reads in place of an open file.
    pub fn backed(&self, handle: u64, backing: Option<u32>) {
        if let Some(ear) = self.keeper.as_ref().and_then(|keeper| keeper.ear.lock().clone()) {
            // The one who asks holds the other end.
            let _ = ear.send((handle, backing));
        }
    }

    /// The keeper will say nothing more.
    pub fn keeper_is_gone(&self) {
        if let Some(keeper) = &self.keeper {
            keeper.ear.lock().take();
        }
    }

    /// Notes a handle whose file cannot be opened now.
    pub(crate) fn miss(&self, handle: u64, holder: Holder, backing: Option<u32>) {
        self.missing.write().insert(handle, Missing { holder, backing });
    }

    /// A file that is open; one that is missing is opened as soon as it can be.
    pub(crate) fn get(
        &self,
        handle: u64,
        open: impl FnOnce(Ino) -> FsResult<Arc<dyn File>>,
    ) -> FsResult<Arc<dyn File>> {
        if let Some(found) = self.files.read().get(&handle) {
            return Ok(found.file.clone());
        }
        let missing = self.missing.read().get(&handle).copied();
        let Missing { holder, backing } = missing.ok_or_else(FsError::stale)?;
        let file = open(holder.ino)?;
        self.add(handle, file.clone(), holder, backing);
        Ok(file)
    }

    pub(crate) fn remove(&self, handle: u64) {
        // What closing costs is not paid under the lock.
        let closed = self.files.write().remove(&handle);
        drop(closed);
        self.missing.write().remove(&handle);
        if let Some(keeper) = &self.keeper {
            keeper.link.tell(&ToKeeper::Closed { handle }, None);
        }
        *self.closed.lock() += 1;
        self.bell.notify_all();
    }
}

/// The process that a thread belongs to: FUSE names the thread, which may be gone when a person asks.
pub(crate) fn process_of(thread: u32) -> u32 {
    let status = std::fs::read_to_string(format!("/proc/{thread}/status")).unwrap_or_default();
    let process = status.lines().find_map(|line| line.strip_prefix("Tgid:")?.trim().parse().ok());
    process.unwrap_or(thread)
}

/// Open folders, each with the names that it had when reading it began: offsets stay true whatever happens to it.
#[derive(Default)]
pub(crate) struct OpenFolders {
    folders: Mutex<HashMap<u64, Arc<Vec<DirEntry>>>>,
}

impl OpenFolders {
    pub fn add(&self, handle: u64) {
        self.folders.lock().insert(handle, Arc::default());
    }

    pub fn set(&self, handle: u64, names: Arc<Vec<DirEntry>>) {
        self.folders.lock().insert(handle, names);
    }

    pub fn get(&self, handle: u64) -> Option<Arc<Vec<DirEntry>>> {
        self.folders.lock().get(&handle).cloned()
    }

    pub fn remove(&self, handle: u64) {
        self.folders.lock().remove(&handle);
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd as _;

    use super::*;
    use crate::Problem;

    struct Empty;

    impl File for Empty {
        fn len(&self) -> u64 {
            0
        }

        fn read(&self, _: u64, _: &mut [u8]) -> FsResult<()> {
            Ok(())
        }
    }

    #[test]
    fn a_handle_from_before_is_open_also_while_its_file_cannot_be_opened() {
        let files = OpenFiles::default();
        let holder = Holder { pid: 3, ino: Ino(7) };
        files.miss(5, holder, None);
        assert_eq!((files.holders(), files.is_empty()), (vec![holder], false));
        let out_of_reach = |_| Err(FsError::new(Problem::Damage, "the store is out of reach"));
        assert_eq!(files.get(5, out_of_reach).err().map(|e| e.problem()), Some(Problem::Damage));
        // Opened when it can be, once, and by its node.
        let open = |ino: Ino| {
            assert_eq!(ino, Ino(7));
            Ok(Arc::new(Empty) as Arc<dyn File>)
        };
        assert!(files.get(5, open).is_ok() && files.get(5, out_of_reach).is_ok());
        assert_eq!(files.holders(), [holder]);
        files.remove(5);
        assert!(files.is_empty());
        assert_eq!(files.get(5, open).err().map(|e| e.problem()), Some(Problem::Stale));
    }

    /// Bytes that lie in a file on disk.
    struct OnDisk(std::fs::File);

    impl File for OnDisk {
        fn len(&self) -> u64 {
            0
        }

        fn read(&self, _: u64, _: &mut [u8]) -> FsResult<()> {
            Ok(())
        }

        fn backing(&self) -> Option<BorrowedFd<'_>> {
            Some(self.0.as_fd())
        }
    }

    fn on_disk() -> Arc<dyn File> {
        Arc::new(OnDisk(std::fs::File::open("/dev/null").unwrap()))
    }

    /// Answers as many questions as there are answers; what was said before each and after the last.
    fn keeper(link: Link, files: &OpenFiles, answers: &[Option<u32>]) -> Vec<Vec<ToKeeper>> {
        let mut said = vec![vec![]];
        for answer in answers {
            while let Some((message, fd)) = link.receive().unwrap() {
                if let ToKeeper::Back { handle, .. } = message {
                    assert!(fd.is_some());
                    files.backed(handle, *answer);
                    said.push(vec![]);
                    break;
                }
                said.last_mut().unwrap().push(message);
            }
        }
        drop(link);
        files.keeper_is_gone();
        said
    }

    #[test]
    fn all_handles_on_a_node_are_read_in_one_way_until_the_last_is_closed() {
        let (ours, theirs) = Link::pair().unwrap();
        let files = OpenFiles::told_to(Arc::new(ours));
        let holder = |ino| Holder { pid: 3, ino: Ino(ino) };
        std::thread::scope(|scope| {
            let keeper = scope.spawn(|| keeper(theirs, &files, &[Some(9), Some(9), None, Some(8), Some(7)]));
            assert_eq!(files.open(1, on_disk(), holder(7)), Some(9));
            assert_eq!(files.open(2, on_disk(), holder(7)), Some(9));
            // A kernel that is not willing is not asked again while the node is open.
            assert_eq!(files.open(3, on_disk(), holder(8)), None);
            assert_eq!(files.open(4, on_disk(), holder(8)), None);
            (3..5).for_each(|handle| files.remove(handle));
            assert_eq!(files.open(5, on_disk(), holder(8)), Some(8));
            // One that is open since before this server, and one that the server before had begun to open.
            files.miss(10, holder(9), None);
            assert_eq!(files.open(11, on_disk(), holder(9)), None);
            files.miss(12, holder(10), Some(7));
            assert_eq!(files.open(12, on_disk(), holder(10)), Some(7));
            let said = keeper.join().unwrap();
            let opened = |handle| ToKeeper::Opened { handle, ino: 7, pid: 3, backing: Some(9) };
            assert_eq!((&said[1], &said[2][..1]), (&vec![opened(1)], &[opened(2)][..]));
        });
        // Without a keeper: as those who have it open, else checked.
        assert_eq!(files.open(6, on_disk(), holder(7)), Some(9));
        assert_eq!(files.open(7, on_disk(), holder(11)), None);
    }
}
