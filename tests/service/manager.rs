//! The service manager's part: it opens a socket unit's sockets, passes copies of them on, receives notes, and keeps
//! the descriptors it is asked to store.

use std::ffi::OsString;
use std::io::{IoSlice, IoSliceMut};
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::net::{SocketAddr as SocketAddress, UnixDatagram, UnixListener};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nix::sys::socket::{
    AddressFamily, Backlog, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr, accept, bind,
    listen, recvmsg, sendmsg, socket,
};
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tng::os::sys::adopt;

use super::lab::{TO_SERVER, ingress};
use super::netns::{Host, Proc, Tng, tngd, wait_until};

/// Listener port of the ingress under test.
pub const LISTEN: u16 = 7100;
/// Takes the sockets and becomes the daemon.
const EXEC: &str = include_str!("exec.py");
/// From start to the first note, and from a signal to its note.
pub const SOON: Duration = Duration::from_secs(15);

/// An ingress whose listener port is known to the socket unit.
pub fn config() -> String {
    ingress(TO_SERVER).replace("[ingress.netfilter]\n", &format!("[ingress.netfilter]\nlisten_port = {LISTEN}\n"))
}

/// What a service sent to its manager.
#[derive(Clone, Default)]
pub struct Notes(Arc<Mutex<Vec<String>>>);

impl Notes {
    /// All notes so far, a variable each.
    pub fn all(&self) -> Vec<String> {
        self.0.lock().unwrap().clone()
    }

    /// How often a variable came that begins so.
    pub fn count(&self, start: &str) -> usize {
        self.all().iter().filter(|note| note.starts_with(start)).count()
    }

    /// Waits for a note.
    #[track_caller]
    pub fn wait(&self, start: &str) {
        self.wait_count(start, 1);
    }

    /// Waits until a note came `n` times.
    #[track_caller]
    pub fn wait_count(&self, start: &str, n: usize) {
        let heard = wait_until(SOON, || self.count(start) >= n);
        assert!(heard, "not {n} times {start} among {:#?}", self.all());
    }

    /// Waits for a status that contains `part`.
    #[track_caller]
    pub fn wait_status(&self, part: &str) {
        let told = |note: &String| note.starts_with("STATUS=") && note.contains(part);
        let heard = wait_until(SOON, || self.all().iter().any(told));
        assert!(heard, "no status with {part:?} among {:#?}", self.all());
    }
}

type Named = Vec<(String, OwnedFd)>;

/// A service manager with one socket unit and its service. It holds copies of all sockets, as the real one does.
pub struct Manager<'a> {
    host: &'a Host,
    instance: String,
    unit: Named,
    store: Arc<Mutex<Named>>,
    abstract_name: Option<&'static str>,
}

impl<'a> Manager<'a> {
    /// Opens the unit's listeners, all with the same options, as a unit has one set for all.
    pub fn new(host: &'a Host, instance: &str, listeners: &[&str], mark: u32) -> Self {
        let open = |addr: &&str| ("tng".to_owned(), host.inside(|| listener(addr, mark)).into());
        let unit = listeners.iter().map(open).collect();
        Self { host, instance: instance.to_owned(), unit, store: Arc::default(), abstract_name: None }
    }

    /// Hears notes on an abstract socket, as service managers in containers do.
    pub fn hearing_on(self, name: &'static str) -> Self {
        Self { abstract_name: Some(name), ..self }
    }

    /// The unit has the instance's unix sockets too, in a directory of root.
    pub fn with_api(mut self) -> Self {
        let dir = self.host.runtime_dir().join(&self.instance);
        std::fs::create_dir_all(&dir).expect("instance directory");
        for file in ["control.sock", "handoff.sock"] {
            let path = dir.join(file);
            let listener = UnixListener::bind(&path).expect("unix socket");
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o660)).expect("mode");
            chown(&path, Some(0), Some(65534)).expect("group");
            self.unit.push(("tng".to_owned(), listener.into()));
        }
        self
    }

    /// Names in the descriptor store.
    pub fn stored(&self) -> Vec<String> {
        self.store.lock().unwrap().iter().map(|(name, _)| name.clone()).collect()
    }

    /// Puts a descriptor into the store, as if an earlier process of the service had sent it.
    pub fn store(&self, name: &str, fd: OwnedFd) {
        self.store.lock().unwrap().push((name.to_owned(), fd));
    }

    /// Takes a name out of the store.
    pub fn forget(&self, name: &str) {
        self.store.lock().unwrap().retain(|(stored, _)| stored != name);
    }

    /// A copy of a stored descriptor.
    pub fn copy(&self, name: &str) -> OwnedFd {
        let store = self.store.lock().unwrap();
        let (_, fd) = store.iter().find(|(stored, _)| stored == name).expect("stored");
        fd.try_clone().expect("copy")
    }

    /// The unit's own copy of a listener.
    fn unit(&self, addr: &str) -> &OwnedFd {
        let addr: SocketAddr = addr.parse().expect("address");
        let is = |fd: &OwnedFd| SockRef::from(fd).local_addr().is_ok_and(|a| a.as_socket() == Some(addr));
        &self.unit.iter().find(|(_, fd)| is(fd)).expect("listener of the unit").1
    }

    /// Mark and transparency of a listener of the unit.
    pub fn options(&self, addr: &str) -> (u32, bool) {
        let socket = SockRef::from(self.unit(addr));
        let v6 = addr.starts_with('[');
        let transparent = if v6 { socket.ip_transparent_v6() } else { socket.ip_transparent_v4() };
        (socket.mark().expect("SO_MARK"), transparent.expect("transparency"))
    }

    /// Whether a listener of the unit is one still.
    pub fn is_listening(&self, addr: &str) -> bool {
        SockRef::from(self.unit(addr)).is_listener().expect("SO_ACCEPTCONN")
    }

    /// Starts the service with copies of the unit's and the stored sockets. `args` come before the file.
    pub fn serve(&self, args: &[&str], env: &[(&str, &str)]) -> (Tng<'a>, Notes) {
        let (notify, fds) = (self.path("notify.sock"), self.path("fds.sock"));
        let notes = Notes::default();
        let (inbox, notify) = self.inbox(&notify);
        std::thread::spawn({
            let (notes, store) = (notes.clone(), Arc::clone(&self.store));
            move || receive(&inbox, &notes, &store)
        });
        let passing = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).expect("socket");
        bind(passing.as_raw_fd(), &UnixAddr::new(&fds).expect("address")).expect("bind");
        listen(&passing, Backlog::new(1).expect("backlog")).expect("listen");
        let file = self.host.config_dir().join(format!("{}.toml", self.instance));
        let (fds, daemon, file) = (fds.to_string_lossy(), tngd(), file.to_string_lossy());
        let daemon = daemon.to_string_lossy();
        let mut words = vec!["-I", "-c", EXEC, &fds, &daemon, "serve"];
        words.extend(args);
        words.push(&file);
        let mut command = self.host.command("/usr/bin/python3", &words);
        command.env("NOTIFY_SOCKET", &notify).envs(env.iter().copied());
        let proc = Proc::spawn(command);
        self.pass(&passing);
        (Tng::adopt(self.host, &self.instance, proc), notes)
    }

    fn pass(&self, passing: &OwnedFd) {
        let store = self.store.lock().unwrap();
        let all: Vec<&(String, OwnedFd)> = self.unit.iter().chain(store.iter()).collect();
        let names = all.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>().join(":") + "\n";
        let fds: Vec<RawFd> = all.iter().map(|(_, fd)| fd.as_raw_fd()).collect();
        let peer = adopt(accept(passing.as_raw_fd()).expect("the program asks for its sockets"));
        let rights = [ControlMessage::ScmRights(&fds)];
        let data = [IoSlice::new(names.as_bytes())];
        sendmsg::<UnixAddr>(peer.as_raw_fd(), &data, &rights, MsgFlags::empty(), None).expect("sendmsg");
    }

    fn inbox(&self, path: &Path) -> (UnixDatagram, OsString) {
        let Some(name) = self.abstract_name else {
            let inbox = UnixDatagram::bind(path).expect("notification socket");
            // As systemd's own is: whoever the service is may send.
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o777)).expect("mode");
            return (inbox, path.into());
        };
        // Abstract names belong to the network namespace.
        let address = SocketAddress::from_abstract_name(name).expect("name");
        (self.host.inside(|| UnixDatagram::bind_addr(&address)).expect("bind"), format!("@{name}").into())
    }

    fn path(&self, file: &str) -> std::path::PathBuf {
        let path = self.host.config_dir().with_file_name(file);
        let _ = std::fs::remove_file(&path);
        path
    }
}

/// A transparent listener, as the socket unit of an instance with captures opens all of them.
pub fn listener(addr: &str, mark: u32) -> std::net::TcpListener {
    let addr: SocketAddr = addr.parse().expect("address");
    let socket = Socket::new(Domain::for_address(addr), Type::STREAM, Some(Protocol::TCP)).expect("socket");
    socket.set_reuse_address(true).expect("SO_REUSEADDR");
    if addr.is_ipv6() {
        socket.set_only_v6(true).expect("IPV6_V6ONLY");
        socket.set_ip_transparent_v6(true).expect("IPV6_TRANSPARENT");
    } else {
        socket.set_ip_transparent_v4(true).expect("IP_TRANSPARENT");
    }
    socket.set_mark(mark).expect("SO_MARK");
    socket.bind(&addr.into()).expect("bind");
    socket.listen(64).expect("listen");
    socket.into()
}

fn receive(inbox: &UnixDatagram, notes: &Notes, store: &Mutex<Named>) {
    let mut buffer = [0; 8192];
    let mut space = nix::cmsg_space!([RawFd; 4]);
    loop {
        let mut io = [IoSliceMut::new(&mut buffer)];
        let got = recvmsg::<UnixAddr>(inbox.as_raw_fd(), &mut io, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC);
        let Ok(message) = got else { return };
        let mut fds = Vec::new();
        for control in message.cmsgs().expect("control messages") {
            if let ControlMessageOwned::ScmRights(passed) = control {
                fds.extend(passed.into_iter().map(adopt));
            }
        }
        let length = message.bytes;
        let text = String::from_utf8_lossy(&buffer[..length]).into_owned();
        let name = text.lines().find_map(|l| l.strip_prefix("FDNAME=")).unwrap_or("stored").to_owned();
        if text.contains("FDSTORE=1") {
            store.lock().unwrap().extend(fds.into_iter().map(|fd| (name.clone(), fd)));
        } else if text.contains("FDSTOREREMOVE=1") {
            store.lock().unwrap().retain(|(stored, _)| *stored != name);
        }
        notes.0.lock().unwrap().extend(text.lines().map(str::to_owned));
    }
}

/// `tngd serve` of instance `in` with inherited listeners and a notification socket.
pub fn serve<'a>(host: &'a Host, env: &[(&str, &str)]) -> (Tng<'a>, Notes) {
    let (v4, v6) = (format!("127.0.0.1:{LISTEN}"), format!("[::1]:{LISTEN}"));
    Manager::new(host, "in", &[&v4, &v6], 0).serve(&[], env)
}
