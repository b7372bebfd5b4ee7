//! The generator as systemd runs it: under its own name, with a directory to write to, on whatever the files say.

use std::collections::BTreeMap;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

const VERIFY: &str = "[ingress.verify]\nprovider = \"sample\"\nallow_sample = true\n";
const ATTEST: &str = "[egress.attest]\nprovider = \"sample\"\n";

/// A host's directories, as far as the generator looks at them.
struct Host {
    dir: tempfile::TempDir,
}

impl Host {
    fn new() -> Self {
        let host = Self { dir: tempfile::tempdir().unwrap() };
        for dir in ["etc", "run/.net", "state", "bin"] {
            std::fs::create_dir_all(host.path(dir)).unwrap();
        }
        symlink(env!("CARGO_BIN_EXE_tngd"), host.path("bin/tng-generator")).unwrap();
        host
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        std::fs::write(self.path(name), text).unwrap();
    }

    /// Runs the generator into an empty directory, as a daemon-reload does.
    fn generate(&self) -> (Output, BTreeMap<String, String>) {
        let to = self.path("generator");
        let _ = std::fs::remove_dir_all(&to);
        std::fs::create_dir(&to).unwrap();
        let output = alone(&self.path("bin/tng-generator"))
            .args([&to, &to, &to])
            .env("TNG_CONFIG_DIR", self.path("etc"))
            .env("TNG_RUNTIME_DIR", self.path("run"))
            .env("TNG_STATE_DIR", self.path("state"))
            .env_remove("SYSTEMD_SCOPE")
            .output()
            .unwrap();
        let mut files = BTreeMap::new();
        collect(&to, &to, &mut files);
        (output, files)
    }
}

/// A program in a network namespace of its own: which ports are free must not depend on what else runs.
fn alone(program: &Path) -> Command {
    let mut command = Command::new("unshare");
    command.args(["--net", "sh", "-c", "ip link set lo up && exec \"$0\" \"$@\""]).arg(program);
    command
}

fn collect(top: &Path, dir: &Path, files: &mut BTreeMap<String, String>) {
    for entry in std::fs::read_dir(dir).unwrap().flatten() {
        let path = entry.path();
        let name = path.strip_prefix(top).unwrap().display().to_string();
        match std::fs::read_link(&path) {
            Ok(to) => drop(files.insert(name, format!("-> {}", to.file_name().unwrap().display()))),
            Err(_) if path.is_dir() => collect(top, &path, files),
            Err(_) => drop(files.insert(name, std::fs::read_to_string(&path).unwrap())),
        }
    }
}

fn settings(text: &str) -> Vec<&str> {
    text.lines().filter(|l| !l.starts_with('#')).collect()
}

fn mapping(name: &str, port: u16) -> String {
    format!(
        "[[ingress]]\nname = \"{name}\"\n[ingress.mapping]\nlisten = \"127.0.0.1:{port}\"\ntarget = \"192.0.2.1:1\"\n{VERIFY}"
    )
}

fn capture(port: u16) -> String {
    format!("[[egress]]\nname = \"web\"\n[egress.netfilter]\ncapture = [{{ port = {port} }}]\n{ATTEST}")
}

#[test]
fn each_file_becomes_the_listeners_of_its_socket_unit_and_a_wish_of_the_target() {
    let host = Host::new();
    host.write("etc/a.toml", &mapping("m", 10001));
    host.write("etc/b.toml", &capture(30001));
    let (output, files) = host.generate();
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
    assert_eq!(settings(&files["tng@a.socket.d/50-listen.conf"]), ["[Socket]", "ListenStream=127.0.0.1:10001"]);
    let captured = settings(&files["tng@b.socket.d/50-listen.conf"]);
    assert_eq!(captured[..2], ["[Socket]", "ListenStream=127.0.0.1:40000"]);
    assert!(captured.contains(&"Transparent=yes") && captured.contains(&"Mark=565"), "{captured:?}");
    assert_eq!(settings(&files["tng.target.d/50-instances.conf"]), ["[Unit]", "Wants=tng@a.service tng@b.service"]);
}

#[test]
fn a_broken_file_fails_nothing_and_is_named_by_its_unit() {
    let host = Host::new();
    host.write("etc/a.toml", &mapping("m", 10001).replace("10001", "70000"));
    host.write("etc/b.toml", &mapping("m", 10002));
    host.write("etc/Bad Name.toml", "");
    let (output, files) = host.generate();
    assert!(output.status.success(), "{output:?}");
    let log = String::from_utf8(output.stderr).unwrap();
    assert!(log.contains("a.toml:4:10:") && log.contains("Bad Name"), "{log}");
    let problem = &files["tng@a.service.d/50-problem.conf"];
    assert!(problem.contains("Description=tng a, configuration refused: ") && problem.contains("a.toml:4:10:"));
    assert!(!files.contains_key("tng@a.socket.d/50-listen.conf"), "nothing is known to listen on");
    assert!(files.contains_key("tng@b.socket.d/50-listen.conf"), "the other instance is not concerned");
}

#[test]
fn with_a_broken_file_the_last_good_listeners_are_kept() {
    let host = Host::new();
    host.write("etc/a.toml", "[[ingress]\n");
    host.write("state/a.toml", &capture(30001));
    let (output, files) = host.generate();
    assert!(output.status.success(), "{output:?}");
    assert!(files["tng@a.socket.d/50-listen.conf"].contains("ListenStream=127.0.0.1:40000"));
    assert!(files["tng@a.service.d/50-problem.conf"].contains("a.toml:1:"), "{files:?}");
}

#[test]
fn a_unit_that_is_up_keeps_its_sockets_whatever_the_file_says_by_now() {
    let host = Host::new();
    host.write("etc/a.toml", &mapping("m", 10009));
    host.write("run/.net/a.toml", &mapping("m", 10001));
    let (_, files) = host.generate();
    assert_eq!(settings(&files["tng@a.socket.d/50-listen.conf"]), ["[Socket]", "ListenStream=127.0.0.1:10001"]);
    std::fs::remove_file(host.path("etc/a.toml")).unwrap();
    assert_eq!(host.generate().1["tng@a.socket.d/50-listen.conf"], files["tng@a.socket.d/50-listen.conf"]);
    host.write("etc/a.toml", &mapping("m", 10009));
    std::fs::remove_file(host.path("run/.net/a.toml")).unwrap();
    let (_, files) = host.generate();
    assert_eq!(settings(&files["tng@a.socket.d/50-listen.conf"]), ["[Socket]", "ListenStream=127.0.0.1:10009"]);
}

#[test]
fn ports_of_captures_are_those_that_the_units_will_be_given() {
    let host = Host::new();
    // "a-b.toml" is listed before "a.toml", though "a" is the lesser name.
    for (name, port) in [("a", 1), ("a-b", 2), ("c", 3)] {
        host.write(&format!("etc/{name}.toml"), &capture(port));
    }
    let (_, files) = host.generate();
    for name in ["c", "a", "a-b"] {
        let rules = alone(Path::new(env!("CARGO_BIN_EXE_tngctl")))
            .args(["rules", name])
            .env("TNG_CONFIG_DIR", host.path("etc"))
            .env("TNG_RUNTIME_DIR", host.path("run"))
            .output()
            .unwrap();
        let rules = String::from_utf8(rules.stdout).unwrap();
        let port = |text: &str| text.split_once("127.0.0.1:").unwrap().1[..5].to_owned();
        assert_eq!(port(&files[&format!("tng@{name}.socket.d/50-listen.conf")]), port(&rules), "of {name}");
    }
}

#[test]
fn a_generator_without_a_directory_to_write_to_still_succeeds() {
    let host = Host::new();
    let output = Command::new(host.path("bin/tng-generator")).env("TNG_CONFIG_DIR", host.path("etc")).output().unwrap();
    assert!(output.status.success(), "{output:?}");
}

#[test]
fn captures_of_an_egress_share_one_mark_in_an_instance() {
    let host = Host::new();
    let second = capture(2).replace("web", "db").replace("[egress.netfilter]\n", "[egress.netfilter]\nso_mark = 777\n");
    host.write("etc/a.toml", &format!("{}{second}", capture(1)));
    let check = Command::new(env!("CARGO_BIN_EXE_tngd")).arg("check").arg(host.path("etc/a.toml")).output().unwrap();
    assert_eq!(check.status.code(), Some(78));
    let said = String::from_utf8(check.stderr).unwrap();
    assert!(said.contains("mark 777 differs from 565") && said.contains("an instance of its own"), "{said}");
}
