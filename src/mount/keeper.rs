//! The keeper of a mount: holds the connection to the kernel and the locks of what is open, so that the server may die, or be
//! replaced by another version, under running VMs.
//!
//! The server is a child that is told everything through a [`Link`]. What it opens and closes it tells the keeper before the
//! kernel hears of it. The keeper itself does nothing that could fail: it reads no store and answers no request.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Instant;

use anyhow::{Context as _, anyhow};
use knib_fuse::{Device, Link, MountConfig, PROTOCOL, ToKeeper, ToServer};
use signal_hook::consts::{SIGHUP, SIGINT, SIGKILL, SIGTERM, SIGUSR1};
use signal_hook::iterator::Signals;

use super::life::{MountPoint, NAME, raise_limit_of_open_files};
use super::patience::{Next, Patience};
use super::server::in_use;

/// What a keeper has to know.
pub struct Kept<'a> {
    /// Where.
    pub place: &'a MountPoint,
    /// Users other than the one that mounts may enter.
    pub allow_other: bool,
    /// Whether the kernel's way to hand requests out again is used where it has one.
    pub resend: bool,
    /// The program that serves, given the number of servers that there were before it.
    pub server: &'a dyn Fn(u64) -> Command,
}

/// Mounts, and keeps the mount served until it is unmounted or the program is asked to end. `ready` is called once, when it
/// can be used.
pub fn keep(kept: Kept<'_>, ready: impl FnOnce() -> io::Result<()>) -> anyhow::Result<()> {
    raise_limit_of_open_files();
    let (sender, events) = channel();
    // Before the mount: a signal from now on must not leave one behind.
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP, SIGUSR1])?;
    let heard = sender.clone();
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        for signal in signals.forever() {
            if heard.send(Event::Signal(signal)).is_err() {
                break;
            }
        }
    })?;
    let mut keeper = Keeper {
        kept,
        sender,
        device: None,
        open: HashMap::new(),
        unanswered: Vec::new(),
        serving: None,
        coming: None,
        start_at: None,
        patience: Patience::default(),
        has_refused: false,
        starts: 0,
        asked: 0,
        asked_to_end: 0,
    };
    keeper.start()?;
    let ended = keeper.run(&events, ready);
    if ended.is_err() {
        keeper.detach();
    }
    ended
}

enum Event {
    Said(u64, ToKeeper, Option<OwnedFd>),
    /// The server's end is closed; with what was wrong with it, if that was why.
    Gone(u64, Option<String>),
    Signal(i32),
}

/// A file that is open, and the lock that says so.
struct Open {
    ino: u64,
    pid: u32,
    /// What the kernel reads by itself; one for all handles on a node.
    backing: Option<u32>,
    /// Only held.
    _lock: Option<OwnedFd>,
}

/// A server.
struct Running {
    number: u64,
    child: Child,
    link: Link,
    prepared: bool,
    /// Since when it serves.
    since: Option<Instant>,
    /// What it reads from, kept so that what it takes is not lost with it.
    queue: Option<OwnedFd>,
    /// Why it cannot serve, as it says.
    failed: Option<String>,
}

impl Drop for Running {
    /// None is left behind.
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

struct Keeper<'a> {
    kept: Kept<'a>,
    sender: Sender<Event>,
    device: Option<Device>,
    open: HashMap<u64, Open>,
    /// Queues of dead servers, with what these had taken and not answered.
    unanswered: Vec<OwnedFd>,
    serving: Option<Running>,
    coming: Option<Running>,
    start_at: Option<Instant>,
    patience: Patience,
    /// Whether it was said that the kernel does not read stored files by itself.
    has_refused: bool,
    starts: u64,
    /// Signals to end that wait until the server has said what it opened before them, and those that were acted on.
    asked: u32,
    asked_to_end: u32,
}

impl Keeper<'_> {
    fn run(
        &mut self,
        events: &Receiver<Event>,
        ready: impl FnOnce() -> io::Result<()>,
    ) -> anyhow::Result<()> {
        let mut ready = Some(ready);
        loop {
            let event = match self.start_at {
                None => events.recv().context("the keeper lost its own threads")?,
                Some(at) => match events.recv_timeout(at.saturating_duration_since(Instant::now())) {
                    Ok(event) => event,
                    Err(RecvTimeoutError::Timeout) => {
                        self.start_at = None;
                        if self.has_ended() {
                            return Ok(());
                        }
                        self.start_again()?;
                        continue;
                    }
                    Err(error) => return Err(error).context("the keeper lost its own threads"),
                },
            };
            let mut due = 0;
            match event {
                Event::Said(_, ToKeeper::Pong, _) => due = self.asked.min(1),
                Event::Said(number, message, fd) => {
                    if self.hear(number, message, fd)?
                        && let Some(ready) = ready.take()
                    {
                        ready()?;
                    }
                }
                Event::Gone(number, why) => {
                    if self.bury(number, why)? {
                        return Ok(());
                    }
                }
                Event::Signal(SIGUSR1) => self.replace(),
                Event::Signal(_) => due = self.ask(),
            }
            if self.serving.is_none() {
                due = self.asked;
            }
            for _ in 0..due {
                self.asked -= 1;
                if self.asked_to_end()? {
                    return Ok(());
                }
            }
        }
    }

    /// A signal: what is open is known when the server has answered, which the third signal does not wait for. How many are to be
    /// acted on now.
    fn ask(&mut self) -> u32 {
        self.asked += 1;
        match &self.serving {
            Some(serving) if self.asked + self.asked_to_end < 3 => {
                serving.link.tell(&ToServer::Ping, None);
                0
            }
            _ => self.asked,
        }
    }

    /// Starts a server, which gets ready beside the one that serves.
    fn start(&mut self) -> anyhow::Result<()> {
        let (link, theirs) = Link::pair().context("cannot make a pair of sockets")?;
        let mut command = (self.kept.server)(self.starts);
        command.stdin(theirs.into_fd()).stdout(Stdio::null());
        // It must not keep a folder busy that someone wants to unmount, and a terminal's signals are for the keeper.
        command.current_dir("/").process_group(0);
        let child = command.spawn().context("cannot start the program that serves the mount")?;
        let number = self.starts;
        self.starts += 1;
        let (ears, sender) = (link.try_clone().context("cannot listen to the server")?, self.sender.clone());
        self.coming =
            Some(Running { number, child, link, prepared: false, since: None, queue: None, failed: None });
        std::thread::Builder::new().name(format!("server {number}")).spawn(move || {
            let why = loop {
                match ears.receive() {
                    Ok(Some((message, fd))) => {
                        if sender.send(Event::Said(number, message, fd)).is_err() {
                            return;
                        }
                    }
                    Ok(None) => break None,
                    Err(error) => break Some(error.to_string()),
                }
            };
            let _ = sender.send(Event::Gone(number, why));
        })?;
        Ok(())
    }

    /// Starts the next server, where nothing may end the keeper any more.
    fn start_again(&mut self) -> anyhow::Result<()> {
        match self.start() {
            Ok(()) => Ok(()),
            Err(error) => {
                tracing::error!("{error:#}");
                let next = self.patience.after_death(None, false);
                self.plan(next)
            }
        }
    }

    fn has_ended(&self) -> bool {
        self.device.as_ref().is_some_and(Device::has_ended)
    }

    /// What a server says. Whether it serves now.
    fn hear(&mut self, number: u64, message: ToKeeper, fd: Option<OwnedFd>) -> anyhow::Result<bool> {
        match message {
            ToKeeper::Prepared { protocol, version } => {
                let Some(coming) = self.coming.as_mut().filter(|s| s.number == number) else {
                    return Ok(false);
                };
                if protocol != PROTOCOL {
                    let why = format!(
                        "version {version} cannot take this mount over (it speaks {protocol}, this keeper {PROTOCOL})"
                    );
                    coming.failed = Some(why);
                    let _ = coming.child.kill();
                    return Ok(false);
                }
                tracing::info!("version {version} is ready to serve {}", self.kept.place.path().display());
                coming.prepared = true;
                self.advance()?;
            }
            ToKeeper::Failed { why } => {
                if let Some(coming) = self.coming.as_mut().filter(|s| s.number == number) {
                    coming.failed = Some(why);
                }
            }
            ToKeeper::Opened { handle, ino, pid, backing } => {
                let before = self.open.insert(handle, Open { ino, pid, backing, _lock: fd });
                self.let_go(before);
            }
            ToKeeper::Back { handle, ino, pid } => {
                let backing = fd.and_then(|fd| self.back(ino, fd.as_fd()));
                if backing.is_some() {
                    let fresh = Open { ino, pid, backing, _lock: None };
                    self.open.entry(handle).or_insert(fresh).backing = backing;
                }
                // What a server that is dead by now has asked for is told to the next one with the handle.
                if let Some(serving) = self.serving.as_ref().filter(|s| s.number == number) {
                    serving.link.tell(&ToServer::Backed { handle, backing }, None);
                }
            }
            ToKeeper::Closed { handle } => {
                let before = self.open.remove(&handle);
                self.let_go(before);
                if self.asked_to_end > 0 && self.open.is_empty() {
                    self.detach();
                }
            }
            // The signal that it answers is acted on by the caller.
            ToKeeper::Pong => {}
            ToKeeper::Answer { answer } => return self.take_answer(number, &answer),
        }
        Ok(false)
    }

    /// Has the kernel read the file of a node by itself. It knows it by one number for all handles, which nobody but this process
    /// asks for and gives back: servers may die at any moment.
    fn back(&mut self, ino: u64, file: BorrowedFd<'_>) -> Option<u32> {
        let known = self.open.values().filter(|open| open.ino == ino).find_map(|open| open.backing);
        if known.is_some() {
            return known;
        }
        match self.device.as_ref()?.open_backing(file) {
            Ok(fresh) => Some(fresh),
            Err(error) => {
                if !std::mem::replace(&mut self.has_refused, true) {
                    let place = self.kept.place.path().display();
                    tracing::warn!("no passthrough at {place}: {}", why_no_passthrough(&error));
                }
                None
            }
        }
    }

    /// Has the kernel forget a file when the last handle on it is closed: it would hold the file's room.
    fn let_go(&self, closed: Option<Open>) {
        let Some(backing) = closed.as_ref().and_then(|open| open.backing) else { return };
        if self.open.values().any(|open| open.backing == Some(backing)) {
            return;
        }
        if let Some(Err(error)) = self.device.as_ref().map(|d| d.close_backing(backing)) {
            tracing::error!("the kernel keeps a file that is closed until the mount ends: {error}");
        }
    }

    /// The server serves: the kernel gets its answer, if it has none yet.
    fn take_answer(&mut self, number: u64, answer: &[u8]) -> anyhow::Result<bool> {
        let Some(serving) = self.serving.as_mut().filter(|s| s.number == number) else { return Ok(false) };
        serving.since = Some(Instant::now());
        let Some(device) = &mut self.device else { return Ok(false) };
        let place = self.kept.place.path().display();
        if let Err(error) = device.answer(answer) {
            if device.has_ended() {
                return Ok(false);
            }
            return Err(error).with_context(|| format!("the kernel refuses the mount at {place}"));
        }
        Ok(true)
    }

    /// Gives the mount to the server that is prepared, when no other has it.
    fn advance(&mut self) -> anyhow::Result<()> {
        if !self.coming.as_ref().is_some_and(|s| s.prepared) {
            return Ok(());
        }
        if let Some(serving) = &mut self.serving {
            // Its last words come first: what it opened is what the next one opens.
            let _ = serving.child.kill();
            return Ok(());
        }
        let Some(mut server) = self.coming.take() else { return Ok(()) };
        let device = match &mut self.device {
            Some(device) => device,
            none => {
                let config = MountConfig { allow_other: self.kept.allow_other, name: NAME.into() };
                none.insert(Device::mount(self.kept.place.path(), &config)?)
            }
        };
        let queue = match device.queue() {
            Ok(queue) => queue,
            Err(_) if device.has_ended() => return Ok(()),
            Err(error) => return Err(error).context("cannot make a queue of the mount"),
        };
        if !self.unanswered.is_empty() {
            // Before the next one takes anything. What it has taken would be handed out to it again as well, and who had opened a
            // file could have closed it before the second answer makes it open for ever.
            match device.resend() {
                Ok(()) => {}
                Err(_) if device.has_ended() => {}
                Err(error) => {
                    let place = self.kept.place.path().display();
                    tracing::error!("the kernel does not hand out again what was read at {place}: {error}");
                }
            }
            // Closing a queue fails what is left in it.
            self.unanswered.clear();
        }
        // A server that died meanwhile is seen by its reader.
        let link = &server.link;
        link.tell(&ToServer::Greeting { request: device.greeting().to_vec() }, Some(queue.as_fd()));
        for (&handle, open) in &self.open {
            let Open { ino, pid, backing, .. } = *open;
            link.tell(&ToServer::Handle { handle, ino, pid, backing }, None);
        }
        link.tell(&ToServer::Go, None);
        if self.kept.resend && device.can_resend() {
            server.queue = Some(queue);
        }
        self.serving = Some(server);
        Ok(())
    }

    /// A server is gone. Whether that is the end.
    fn bury(&mut self, number: u64, why: Option<String>) -> anyhow::Result<bool> {
        let served = self.serving.as_ref().is_some_and(|s| s.number == number);
        let slot = if served { &mut self.serving } else { &mut self.coming };
        let Some(mut dead) = slot.take_if(|s| s.number == number) else { return Ok(false) };
        if let Some(why) = why {
            tracing::error!("the server says what cannot be understood, and is ended: {why}");
            let _ = dead.child.kill();
        }
        let status = dead.child.wait().context("cannot wait for the server")?;
        if self.has_ended() {
            return Ok(true);
        }
        let how = describe(status, dead.failed.as_deref());
        let Some(_) = &self.device else {
            return Err(anyhow!("{}", dead.failed.take().unwrap_or(format!("the server ended ({status})"))));
        };
        let place = self.kept.place.path().display();
        if !served && self.serving.is_some() {
            tracing::error!("the new server of {place} {how}: the one before goes on");
            return Ok(false);
        }
        self.unanswered.extend(dead.queue.take());
        if self.coming.is_some() {
            // It was killed for the one that takes over.
            tracing::warn!("the server of {place} (pid {}) is replaced", dead.child.id());
            self.advance()?;
            return Ok(false);
        }
        tracing::error!("the server of {place} (pid {}) {how}", dead.child.id());
        let lived = dead.since.map(|since| since.elapsed());
        let next = self.patience.after_death(lived, status.signal() == Some(SIGKILL));
        self.plan(next)?;
        Ok(false)
    }

    fn plan(&mut self, next: Next) -> anyhow::Result<()> {
        let place = self.kept.place.path().display();
        let pause = match next {
            Next::Resume(pause) => {
                tracing::warn!("the next server of {place} takes over: {} files are open", self.open.len());
                pause
            }
            Next::Abandon(pause) => {
                tracing::error!("what was being read at {place} fails, in case that it ended the servers");
                self.unanswered.clear();
                pause
            }
            Next::GiveUp => {
                let stopper = self.device.as_ref().map(Device::stopper);
                if let Some(Err(error)) = stopper.map(|s| s.detach()) {
                    tracing::error!("cannot unmount: {error}");
                }
                return Err(anyhow!(
                    "the servers of {place} die one after the other: given up, what reads from it gets errors; the log says why, `knibfs mount` mounts again"
                ));
            }
        };
        self.start_at = Some(Instant::now() + pause);
        Ok(())
    }

    /// Puts another server, of the program as it is installed now, in the place of this one.
    fn replace(&mut self) {
        if self.coming.is_some() || self.start_at.is_some() {
            return;
        }
        if let Err(error) = self.start() {
            tracing::error!("{error:#}: the server before goes on");
        }
    }

    /// The first time, the mount ends when nobody uses it; the second time, under them: what is open stays readable until it is
    /// closed; the third time, at once. Whether that is now.
    fn asked_to_end(&mut self) -> anyhow::Result<bool> {
        self.asked_to_end += 1;
        if self.device.is_none() {
            return Ok(true);
        }
        match self.asked_to_end {
            1 if !self.open.is_empty() => {
                let pids = self.open.values().map(|open| open.pid);
                tracing::warn!("{}", in_use(self.kept.place.path(), pids));
            }
            1 | 2 => self.detach(),
            _ => {
                self.detach();
                let place = self.kept.place.path().display();
                return Err(anyhow!(
                    "ended by a third signal while {} files of {place} were open",
                    self.open.len()
                ));
            }
        }
        Ok(self.has_ended() && self.serving.is_none())
    }

    fn detach(&self) {
        if let Some(Err(error)) = self.device.as_ref().map(|d| d.stopper().detach()) {
            tracing::error!("cannot unmount: {error}");
        }
    }
}

/// For the log: what is done instead, and why.
fn why_no_passthrough(error: &io::Error) -> String {
    use rustix::io::Errno;
    let way_out = match Errno::from_io_error(error) {
        Some(Errno::PERM) => ": only root may ask for it (CAP_SYS_ADMIN)",
        Some(Errno::LOOP) => ": the store lies on a file system that lies on another, as overlayfs does",
        Some(Errno::NOTTY | Errno::OPNOTSUPP | Errno::INVAL) => {
            ": the kernel has it from Linux 6.9 on, where it is built with CONFIG_FUSE_PASSTHROUGH"
        }
        _ => "",
    };
    format!("stored files are read through the server, every byte checked ({error}{way_out})")
}

fn describe(status: ExitStatus, failed: Option<&str>) -> String {
    match (failed, status.signal()) {
        (Some(why), _) => format!("cannot serve: {why}"),
        (None, Some(signal)) => format!("was ended by signal {signal}"),
        (None, None) => format!("ended ({status})"),
    }
}
