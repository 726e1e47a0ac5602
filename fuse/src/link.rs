//! What a keeper and the server of its mount say to each other.
//!
//! One of them may be of a newer version than the other, so messages are JSON: fields that are not known are ignored, and
//! [`PROTOCOL`] counts the changes that need more than that.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Version of what is said here.
pub const PROTOCOL: u32 = 1;

/// No message is longer. Bytes.
const LONGEST: usize = 64 << 10;

/// What the keeper says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToServer {
    /// The kernel's first request, which it sends only once. With the descriptor that this server reads requests from.
    Greeting {
        /// The request.
        request: Vec<u8>,
    },
    /// A file that is open.
    Handle {
        /// Its number.
        handle: u64,
        /// Its node.
        ino: u64,
        /// Who opened it.
        pid: u32,
        /// What the kernel reads in its place, where it does so by itself.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        backing: Option<u32>,
    },
    /// The answer to [`ToKeeper::Back`].
    Backed {
        /// The handle.
        handle: u64,
        /// The number by which the kernel knows the file now; none where it does not take it.
        backing: Option<u32>,
    },
    /// All is said: serve.
    Go,
    /// To be answered by [`ToKeeper::Pong`].
    Ping,
}

/// What the server says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToKeeper {
    /// It could serve.
    Prepared {
        /// [`PROTOCOL`].
        protocol: u32,
        /// Of the program, for people.
        version: String,
    },
    /// It cannot serve.
    Failed {
        /// Why.
        why: String,
    },
    /// The answer to the greeting. From now on it serves.
    Answer {
        /// For the kernel, if it has none yet.
        answer: Vec<u8>,
    },
    /// A file is open. With the descriptor whose lock says that it is in use, if there is one.
    Opened {
        /// Its number.
        handle: u64,
        /// Its node.
        ino: u64,
        /// Who opened it.
        pid: u32,
        /// What the kernel reads in its place, as the keeper has said.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        backing: Option<u32>,
    },
    /// The kernel shall read a file that is being opened by itself. With the descriptor to read from. [`ToKeeper::Opened`] follows the
    /// answer. Only servers that were told to do so say this, and only keepers that know it tell them.
    Back {
        /// Its number.
        handle: u64,
        /// Its node.
        ino: u64,
        /// Who opens it.
        pid: u32,
    },
    /// It is closed.
    Closed {
        /// Its number.
        handle: u64,
    },
    /// What was opened before the question is said.
    Pong,
}

/// One end. Messages stay whole and in order, and what was sent arrives also when the sender dies.
#[derive(Debug)]
pub struct Link(OwnedFd);

impl Link {
    /// Both ends.
    pub fn pair() -> io::Result<(Self, Self)> {
        let (one, other) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        Ok((Self(one), Self(other)))
    }

    /// The end that this process was started with as standard input.
    pub fn from_stdin() -> io::Result<Self> {
        Ok(Self(io::stdin().as_fd().try_clone_to_owned()?))
    }

    /// The same end, for another thread.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self(self.0.try_clone()?))
    }

    /// The descriptor, for the standard input of a process to start.
    pub fn into_fd(self) -> OwnedFd {
        self.0
    }

    /// Says something, with a descriptor or without.
    pub fn send(&self, message: &impl Serialize, fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
        self.send_bytes(&serde_json::to_vec(message)?, fd)
    }

    /// The same where nothing can be done about a failure: the other end is gone, which its reader sees.
    pub fn tell(&self, message: &impl Serialize, fd: Option<BorrowedFd<'_>>) {
        if let Err(error) = self.send(message, fd) {
            tracing::debug!("cannot speak with the other process of the mount: {error}");
        }
    }

    pub(crate) fn send_bytes(&self, bytes: &[u8], fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
        loop {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut ancillary = SendAncillaryBuffer::new(&mut space);
            let fds = fd.map(|fd| [fd]);
            if let Some(fds) = &fds {
                ancillary.push(SendAncillaryMessage::ScmRights(fds));
            }
            match sendmsg(&self.0, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL) {
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Waits for what is said next; none when the other end is gone.
    pub fn receive<M: DeserializeOwned>(&self) -> io::Result<Option<(M, Option<OwnedFd>)>> {
        let (bytes, fd) = self.receive_bytes()?;
        if bytes.is_empty() {
            return Ok(None);
        }
        Ok(Some((serde_json::from_slice(&bytes)?, fd)))
    }

    /// Empty at the end.
    pub(crate) fn receive_bytes(&self) -> io::Result<(Vec<u8>, Option<OwnedFd>)> {
        let mut bytes = vec![0; LONGEST];
        loop {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut ancillary = RecvAncillaryBuffer::new(&mut space);
            let mut into = [IoSliceMut::new(&mut bytes)];
            match recvmsg(&self.0, &mut into, &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
                Ok(found) => {
                    let mut fd = None;
                    for message in ancillary.drain() {
                        if let RecvAncillaryMessage::ScmRights(fds) = message {
                            fd = fds.last().or(fd);
                        }
                    }
                    bytes.truncate(found.bytes);
                    return Ok((bytes, fd));
                }
                // The other end died with something unread: that is said once, and what it had sent comes all the same.
                Err(Errno::INTR | Errno::CONNRESET) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};

    use super::*;

    #[test]
    fn messages_stay_whole_carry_a_descriptor_and_outlive_their_sender() {
        let (one, other) = Link::pair().unwrap();
        let (mut read, write) = std::io::pipe().unwrap();
        let opened = ToKeeper::Opened { handle: 1, ino: 2, pid: 3, backing: Some(4) };
        one.send(&opened, Some(write.as_fd())).unwrap();
        one.send(&ToKeeper::Closed { handle: 1 }, None).unwrap();
        drop((one, write));
        let (message, fd) = other.receive::<ToKeeper>().unwrap().unwrap();
        assert_eq!(message, opened);
        let mut write = std::fs::File::from(fd.unwrap());
        write.write_all(b"x").unwrap();
        drop(write);
        let mut seen = String::new();
        read.read_to_string(&mut seen).unwrap();
        assert_eq!(seen, "x");
        let (message, fd) = other.receive::<ToKeeper>().unwrap().unwrap();
        assert_eq!((message, fd.is_none()), (ToKeeper::Closed { handle: 1 }, true));
        assert!(other.receive::<ToKeeper>().unwrap().is_none());
    }

    #[test]
    fn what_was_sent_arrives_also_when_its_sender_dies_with_something_unread() {
        let (one, other) = Link::pair().unwrap();
        other.send(&ToServer::Ping, None).unwrap();
        one.send(&ToKeeper::Closed { handle: 1 }, None).unwrap();
        drop(one);
        let (message, _) = other.receive::<ToKeeper>().unwrap().unwrap();
        assert_eq!(message, ToKeeper::Closed { handle: 1 });
        assert!(other.receive::<ToKeeper>().unwrap().is_none());
    }

    #[test]
    fn versions_that_know_nothing_of_passthrough_are_understood_and_understand() {
        let old = r#"{"Opened":{"handle":1,"ino":2,"pid":3}}"#;
        let opened = ToKeeper::Opened { handle: 1, ino: 2, pid: 3, backing: None };
        assert_eq!(serde_json::from_str::<ToKeeper>(old).unwrap(), opened);
        assert_eq!(serde_json::to_string(&opened).unwrap(), old);
        let old = r#"{"Handle":{"handle":1,"ino":2,"pid":3}}"#;
        let handle = ToServer::Handle { handle: 1, ino: 2, pid: 3, backing: None };
        assert_eq!(serde_json::from_str::<ToServer>(old).unwrap(), handle);
        assert_eq!(serde_json::to_string(&handle).unwrap(), old);
    }
}
