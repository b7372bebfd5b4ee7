//! A start that cannot take over leaves what it found: the path is never more open after it than before.

use std::io::{BufRead, BufReader};
use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::fs::PermissionsExt;
use std::process::Stdio;
use std::time::Duration;

use serde_json::json;

use super::lab::{Lab, PORT, egress};
use super::netns::{Family, Host, Parts, Tng, kernel_state, run, run_tngd, tngd, traces, wait_for};
use super::scene::{closed, direct, exchange, lab, narrow, recovers, start_egress, tunnelled};
use super::table::Seen;

/// Where a mapping of the instance would listen, and somebody else does.
const TAKEN: u16 = 9555;

/// `toml` with a second endpoint whose port is taken.
fn blocked(side: &str, toml: &str) -> String {
    format!(
        "{toml}\n[[{side}]]\nname = \"spare\"\nno_ra = true\n[{side}.mapping]\nlisten = \"127.0.0.1:{TAKEN}\"\n\
         target = \"192.0.2.99:1\"\n"
    )
}

/// Kills it and waits for its end: the lock of the instance goes with the process.
fn killed(tng: &mut Tng<'_>) {
    tng.kill();
    tng.wait();
}

fn closed_on_stop(toml: &str) -> String {
    format!("on_stop = \"closed\"\n{toml}")
}

/// One side of the tunnel: its host, its instance, its file, and how its traffic is tried without tng.
struct Side<'a> {
    name: &'static str,
    host: &'a Host,
    instance: &'static str,
    toml: String,
    try_it: fn(&Lab) -> [Seen; 2],
}

fn sides(lab: &Lab) -> [Side<'_>; 2] {
    lab.client.listen(IpAddr::V4(Ipv4Addr::LOCALHOST), TAKEN, json!({}));
    lab.server.listen(IpAddr::V4(Ipv4Addr::LOCALHOST), TAKEN, json!({}));
    [
        Side {
            name: "ingress",
            host: &lab.world.client,
            instance: "in",
            toml: narrow(),
            try_it: |lab| exchange(lab, PORT),
        },
        Side {
            name: "egress",
            host: &lab.world.server,
            instance: "out",
            toml: egress(""),
            try_it: |lab| Family::BOTH.map(|family| lab.plain(family)),
        },
    ]
}

impl Side<'_> {
    /// Runs `toml`, which must fail; returns what it said.
    fn fails(&self, toml: &str, case: &str) -> String {
        self.fails_with(1, toml, case)
    }

    fn fails_with(&self, code: i32, toml: &str, case: &str) -> String {
        let mut failed = Tng::spawn(self.host, self.instance, toml, &[]);
        let status = failed.wait();
        assert_eq!(status.code(), Some(code), "{} {case}: {}", self.name, failed.output());
        failed.output()
    }

    /// A life that was killed, and left its rules.
    fn killed_life(&self) {
        let mut first = Tng::start(self.host, self.instance, &self.toml);
        killed(&mut first);
    }

    /// A file that captures something else.
    fn other(&self) -> String {
        self.toml.replace("port = 8080", "port = 8999")
    }

    fn refuses(&self, lab: &Lab, said: &str, case: &str) {
        let seen = (self.try_it)(lab);
        assert!(closed(&seen), "{} {case}: {seen:?}\n{said}", self.name);
        let way_out = format!("captured traffic is refused until the next start, or: tngd net down {}", self.instance);
        assert!(said.contains(&way_out), "{} {case}: {said}", self.name);
    }

    /// The way out that the message names.
    fn opens_by_hand(&self, lab: &Lab, case: &str) {
        self.host.run(&tngd().to_string_lossy(), &["net", "down", self.instance]).expect_ok();
        assert_eq!(traces(self.host), "", "{} {case}", self.name);
        let seen = (self.try_it)(lab);
        assert!(direct(&seen), "{} {case}: after net down: {seen:?}", self.name);
    }
}

#[test]
fn a_start_that_cannot_listen_leaves_the_rules_of_a_killed_life() {
    let lab = lab();
    for side in sides(&lab) {
        let mut first = Tng::start(side.host, side.instance, &side.toml);
        killed(&mut first);
        let said = side.fails(&blocked(side.name, &side.toml), "after a kill");
        side.refuses(&lab, &said, "after a kill");
        // The second failure finds what the first one left.
        let said = side.fails(&blocked(side.name, &side.toml), "again");
        side.refuses(&lab, &said, "again");
        side.opens_by_hand(&lab, "after a kill");
    }
}

#[test]
fn a_start_that_cannot_listen_leaves_the_rules_of_a_closed_stop() {
    let lab = lab();
    for side in sides(&lab) {
        let first = Tng::start(side.host, side.instance, &closed_on_stop(&side.toml));
        assert!(first.stop().success());
        // Also when the file says "open" by now: what refuses was not made by this start.
        for toml in [closed_on_stop(&side.toml), side.toml.clone()] {
            let said = side.fails(&blocked(side.name, &toml), "after a closed stop");
            side.refuses(&lab, &said, "after a closed stop");
        }
        side.opens_by_hand(&lab, "after a closed stop");
    }
}

#[test]
fn a_first_start_that_cannot_listen_refuses_when_closed_and_leaves_nothing_when_open() {
    let lab = lab();
    for side in sides(&lab) {
        let said = side.fails(&blocked(side.name, &side.toml), "first, open");
        assert_eq!(traces(side.host), "", "{}: {said}", side.name);
        let seen = (side.try_it)(&lab);
        assert!(direct(&seen), "{}: as before the start: {seen:?}", side.name);
        let said = side.fails(&blocked(side.name, &closed_on_stop(&side.toml)), "first, closed");
        side.refuses(&lab, &said, "first, closed");
        side.opens_by_hand(&lab, "first, closed");
    }
}

/// The failed start would have captured nothing of what the earlier life did.
#[test]
fn a_start_that_fails_puts_back_the_rules_that_it_replaced() {
    let lab = lab();
    for side in sides(&lab) {
        let mut first = Tng::start(side.host, side.instance, &side.toml);
        killed(&mut first);
        let other = side.toml.replace("port = 8080", "port = 8999");
        let said = side.fails(&blocked(side.name, &other), "another capture");
        side.refuses(&lab, &said, "another capture");
        side.opens_by_hand(&lab, "another capture");
    }
}

/// The same where rules, and not the listeners, are what fails, and where the data plane is killed before it serves.
#[test]
fn a_start_that_fails_or_is_killed_behind_its_rules_puts_back_those_that_it_replaced() {
    let lab = lab();
    for side in sides(&lab) {
        for (point, action) in [("net-up.record", "error"), ("net-up.done", "error"), ("serve.bound", "kill")] {
            let mut first = Tng::start(side.host, side.instance, &side.toml);
            killed(&mut first);
            let other = side.toml.replace("port = 8080", "port = 8999");
            let fail = ("TNG_FAILPOINT", format!("{point}={action}"));
            let mut failed = Tng::spawn_with(side.host, side.instance, &other, &[], &[(fail.0, &fail.1)]);
            assert_eq!(failed.wait().code(), Some(1), "{} {point}: {}", side.name, failed.output());
            side.refuses(&lab, &failed.output(), point);
            side.opens_by_hand(&lab, point);
        }
    }
}

/// Steps of a start over the rules of an earlier life, at which all of it, or the data plane alone, is killed.
const KILLED_AT: &[&str] =
    &["guard.start", "guard.loaded", "net-up.rule", "net-up.nft", "net-up.record", "net-up.done", "serve.bound"];

#[test]
fn a_start_with_another_capture_that_is_killed_at_any_step_leaves_closed_what_was() {
    let lab = lab();
    for side in sides(&lab) {
        side.killed_life();
        for point in KILLED_AT {
            let fail = ("TNG_FAILPOINT", format!("{point}=kill"));
            let mut dead = Tng::spawn_with(side.host, side.instance, &side.other(), &[], &[(fail.0, &fail.1)]);
            assert!(!dead.wait().success(), "{} {point}: {}", side.name, dead.output());
            let seen = (side.try_it)(&lab);
            assert!(closed(&seen), "{} {point}: {seen:?}\n{}", side.name, dead.output());
        }
        side.opens_by_hand(&lab, "after starts that were killed");
    }
}

/// What only the earlier life captured stays closed until the data plane serves, and is let go then.
#[test]
fn a_start_with_another_capture_lets_go_what_was_when_it_serves() {
    let lab = lab();
    for side in sides(&lab) {
        side.killed_life();
        let fail = [("TNG_FAILPOINT", "serve.ready=stall")];
        let mut stuck = Tng::spawn_with(side.host, side.instance, &side.other(), &[], &fail);
        let socket = side.host.runtime_dir().join(side.instance).join("control.sock");
        wait_for("the control socket answers", Duration::from_secs(15), || {
            std::os::unix::net::UnixStream::connect(&socket).is_ok()
        });
        let seen = (side.try_it)(&lab);
        assert!(closed(&seen), "{}: before it serves: {seen:?}\n{}", side.name, stuck.output());
        killed(&mut stuck);
        let tng = Tng::start(side.host, side.instance, &side.other());
        let state = || kernel_state(side.host);
        wait_for("the rules are narrowed", Duration::from_secs(10), || !state().contains("8080"));
        let seen = (side.try_it)(&lab);
        assert!(direct(&seen), "{}: what is captured no more: {seen:?}\n{}", side.name, tng.output());
        assert!(!state().contains("_new"), "{}: {}", side.name, state());
        assert!(tng.stop().success());
        assert_eq!(traces(side.host), "", "{}", side.name);
    }
}

/// The steps of the service unit, for a restart that takes a file with another capture.
#[test]
fn a_restart_of_the_unit_lets_go_what_was_when_the_new_file_is_served() {
    let lab = lab();
    for side in sides(&lab) {
        let parts = Parts::new(side.host, side.instance, &side.toml);
        let _guard = parts.guard();
        parts.net_up();
        // The socket unit is up, and the restart was asked for.
        let in_force = side.host.runtime_dir().join(".net").join(format!("{}.toml", side.instance));
        std::fs::write(&in_force, &side.toml).expect("what is in force");
        let bin = side.host.dir().join("bin");
        std::fs::create_dir_all(&bin).expect("directory");
        std::fs::write(bin.join("systemctl"), "#!/bin/sh\necho 0\n").expect("systemctl");
        std::fs::set_permissions(bin.join("systemctl"), std::fs::Permissions::from_mode(0o755)).expect("mode");
        let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap_or_default());
        let step = |step: &str| {
            let mut command = side.host.command(tngd(), &["unit", step, side.instance]);
            command.env("PATH", &path).env("TNG_STATE_DIR", side.host.dir().join("state"));
            run(command)
        };
        let parts = Parts::new(side.host, side.instance, &side.other());
        step("service-starting").expect_ok();
        assert_eq!(std::fs::read_to_string(&in_force).expect("read"), side.other(), "{}: taken", side.name);
        let seen = (side.try_it)(&lab);
        assert!(closed(&seen), "{}: the start may fail yet: {seen:?}", side.name);
        // systemd does not run it after a start that failed; it would open nothing all the same.
        step("service-started");
        let seen = (side.try_it)(&lab);
        assert!(closed(&seen), "{}: nobody serves: {seen:?}", side.name);
        let _serve = parts.serve();
        step("service-started").expect_ok();
        let seen = (side.try_it)(&lab);
        assert!(direct(&seen), "{}: what is captured no more: {seen:?}", side.name);
        let state = kernel_state(side.host);
        assert!(state.contains("8999") && !state.contains("8080") && !state.contains("_new"), "{state}");
    }
}

#[test]
fn a_file_with_errors_over_rules_of_before_changes_nothing_and_says_what_refuses() {
    let lab = lab();
    for side in sides(&lab) {
        let said = side.fails_with(78, "nonsense = true\n", "no rules");
        assert!(!said.contains("net down"), "{}: nothing refuses: {said}", side.name);
        side.killed_life();
        let before = kernel_state(side.host);
        let said = side.fails_with(78, "nonsense = true\n", "over rules");
        assert_eq!(kernel_state(side.host), before, "{}", side.name);
        assert!(said.contains("nonsense"), "{}: {said}", side.name);
        side.refuses(&lab, &said, "exit 78");
        for toml in ["nonsense = true\n".to_owned(), side.toml.replace("capture = [", "capture = [{}, ")] {
            let file = side.host.config_dir().join(format!("{}.toml", side.instance));
            std::fs::write(&file, toml).expect("write");
            let up = run_tngd(side.host, &["net", "up", &file.to_string_lossy()]);
            assert_eq!(up.status.code(), Some(78), "{}: {}", side.name, up.stderr);
            assert!(up.stderr.contains(&format!("tngd net down {}", side.instance)), "{}: {}", side.name, up.stderr);
            assert_eq!(kernel_state(side.host), before, "{}", side.name);
        }
        run_tngd(side.host, &["net", "down", side.instance]).expect_ok();
        let seen = (side.try_it)(&lab);
        assert!(direct(&seen), "{}: after net down: {seen:?}", side.name);
    }
}

#[test]
fn a_data_plane_that_fails_after_it_served_leaves_its_rules() {
    let lab = lab();
    let _egress = start_egress(&lab);
    let host = &lab.world.client;
    let mut tng = super::scene::spawn(&lab, "serve.drained", "kill");
    tng.wait_ready();
    assert!(tunnelled(&exchange(&lab, PORT)));
    tng.kill_data_plane();
    assert!(!tng.wait().success());
    let seen = exchange(&lab, PORT);
    assert!(closed(&seen), "{seen:?}\n{}", tng.output());
    assert!(super::scene::has_table(host));
    recovers(&lab, "a data plane that ended by itself");
}

#[test]
fn a_kept_port_that_a_client_of_the_host_has_taken_is_replaced_by_another() {
    let lab = lab();
    let _egress = start_egress(&lab);
    let host = &lab.world.client;
    let mut first = Tng::start(host, "in", &narrow());
    let port = |text: &str| {
        let status: serde_json::Value = serde_json::from_str(text).expect("JSON");
        let local = status[0]["listeners"][0]["local"].as_str().expect("listener").to_owned();
        local.rsplit(':').next().expect("port").to_owned()
    };
    let kept = port(&first.ctl(&["status", "--json", "in"]).expect_ok());
    killed(&mut first);
    let squatter = Squatter::new(host, &kept);
    let next = Tng::start(host, "in", &narrow());
    assert_ne!(port(&next.ctl(&["status", "--json", "in"]).expect_ok()), kept);
    let seen = exchange(&lab, PORT);
    assert!(tunnelled(&seen), "{seen:?}\n{}", next.output());
    drop(squatter);
    assert!(next.stop().success());
    // A port that the file names is the operator's word: an error, which says who to look for.
    let _squatter = Squatter::new(host, &kept);
    let named = narrow().replace("capture = [", &format!("listen_port = {kept}\ncapture = ["));
    let mut failed = Tng::spawn(host, "in", &named, &[]);
    assert_eq!(failed.wait().code(), Some(1), "{}", failed.output());
    assert!(failed.output().contains(&format!("ss -tanp 'sport = {kept}'")), "{}", failed.output());
}

/// A client of the host that has a port as its own and listens on nothing.
struct Squatter(std::process::Child);

impl Squatter {
    fn new(host: &Host, port: &str) -> Self {
        const BIND: &str = "import socket, sys\ns = socket.socket()\ns.bind(('127.0.0.1', int(sys.argv[1])))\n\
                            print('bound', flush=True)\nsys.stdin.read()";
        let mut command = host.command("python3", &["-c", BIND, port]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("python3");
        let mut line = String::new();
        BufReader::new(child.stdout.take().expect("stdout")).read_line(&mut line).expect("a line");
        assert_eq!(line, "bound\n");
        Self(child)
    }
}

impl Drop for Squatter {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}
