//! Rows of commands that fail: a start, a `net up` or a reload that does not succeed leaves the path no more open than it
//! was, at whatever step it fails or is killed. Needs the cargo feature `failpoints`.

use std::net::{IpAddr, Ipv4Addr};

use serde_json::json;

use super::controls::*;
use super::lab::{Lab, TO_SERVER, egress, ingress};
use super::netns::{Connect, Host, Output, Tng, run, tngctl, tngd};
use super::table::{Expect::*, Fate, Outcome, Row, Seen, row};

const IN: &str = "ingress";
const OUT: &str = "egress";

/// Where a mapping of the instance would listen, and somebody else does.
const TAKEN: u16 = 9555;
/// No configuration.
const BROKEN: &str = "nonsense = true\n";

/// The rows.
pub const ROWS: &[Row] = &[
    row(IN, "killed, then cannot listen", Closed, client_asks, |lab| cannot_listen(lab, IN, Before::Killed)),
    row(OUT, "killed, then cannot listen", Closed, outsider_asks, |lab| cannot_listen(lab, OUT, Before::Killed)),
    row(IN, "closed stop, then cannot listen", Closed, client_asks, |lab| cannot_listen(lab, IN, Before::ClosedStop)),
    row(OUT, "closed stop, then cannot listen", Closed, outsider_asks, |lab| {
        cannot_listen(lab, OUT, Before::ClosedStop)
    }),
    row(IN, "first start, closed, cannot listen", Closed, client_asks, |lab| cannot_listen(lab, IN, Before::Nothing)),
    row(OUT, "first start, closed, cannot listen", Closed, outsider_asks, |lab| {
        cannot_listen(lab, OUT, Before::Nothing)
    }),
    row(IN, "killed, then a file with errors", Closed, client_asks, |lab| file_with_errors(lab, IN)),
    row(OUT, "killed, then a file with errors", Closed, outsider_asks, |lab| file_with_errors(lab, OUT)),
    row(IN, "killed, then another capture fails, each step", Closed, client_asks, |lab| start_over(lab, IN, "error")),
    row(OUT, "killed, then another capture fails, each step", Closed, outsider_asks, |lab| {
        start_over(lab, OUT, "error")
    }),
    row(IN, "killed, then another capture is killed, each step", Closed, client_asks, |lab| {
        start_over(lab, IN, "kill")
    }),
    row(OUT, "killed, then another capture is killed, each step", Closed, outsider_asks, |lab| {
        start_over(lab, OUT, "kill")
    }),
    row(IN, "killed half way, then another capture is killed", Closed, client_asks, |lab| half_start(lab, IN)),
    row(OUT, "killed half way, then another capture is killed", Closed, outsider_asks, |lab| half_start(lab, OUT)),
    row(IN, "killed, then net up fails, each step", Closed, client_asks, |lab| net_up(lab, IN)),
    row(OUT, "killed, then net up fails, each step", Closed, outsider_asks, |lab| net_up(lab, OUT)),
    row(IN, "reload drops a capture, refused", Safe, client_asks, |lab| reload_refused(lab, IN)),
    row(OUT, "reload drops a capture, refused", Closed, outsider_asks, |lab| reload_refused(lab, OUT)),
    row(IN, "reload drops a capture, fails, each step", Safe, client_asks, |lab| reload(lab, IN, other, "error")),
    row(OUT, "reload drops a capture, fails, each step", Closed, outsider_asks, |lab| reload(lab, OUT, other, "error")),
    row(IN, "reload drops a capture, killed, each step", Safe, client_asks, |lab| reload(lab, IN, other, "kill")),
    row(OUT, "reload drops a capture, killed, each step", Closed, outsider_asks, |lab| reload(lab, OUT, other, "kill")),
    row(IN, "reload to no captures, killed, each step", Safe, client_asks, |lab| reload(lab, IN, mapping, "kill")),
    row(OUT, "reload to no captures, killed, each step", Closed, outsider_asks, |lab| {
        reload(lab, OUT, mapping, "kill")
    }),
];

/// What stands before the command.
#[derive(Clone, Copy, PartialEq)]
enum Before {
    /// No rules at all.
    Nothing,
    /// Rules of a life that was killed.
    Killed,
    /// Rules that a stop left by `on_stop = "closed"`.
    ClosedStop,
}

/// The file whose capture must stay closed.
fn usual(side: &str) -> String {
    if side == IN { ingress(TO_SERVER) } else { egress("") }
}

/// One that captures something else, by an endpoint of another name.
fn other(side: &str) -> String {
    let name = if side == IN { "name = \"in\"" } else { "name = \"out\"" };
    usual(side).replace("8080", "8999").replace(name, "name = \"other\"")
}

/// Both endpoints. What the whole instance has stands once, before the first.
fn both(side: &str) -> String {
    let head = format!("[[{side}]]");
    let other = other(side);
    let (_, endpoint) = other.split_once(&head).expect("an endpoint");
    format!("{}\n{head}{endpoint}", usual(side))
}

/// One that captures nothing.
fn mapping(side: &str) -> String {
    listening(side, 7000)
}

fn listening(side: &str, port: u16) -> String {
    format!(
        "[[{side}]]\nname = \"map\"\nno_ra = true\n[{side}.mapping]\nlisten = \"127.0.0.1:{port}\"\n\
         target = \"192.0.2.99:1\"\n"
    )
}

/// One side of the tunnel in a lab.
struct Scene<'a> {
    lab: &'a Lab,
    side: &'static str,
    host: &'a Host,
    name: &'static str,
}

impl<'a> Scene<'a> {
    fn new(lab: &'a Lab, side: &'static str) -> Self {
        if !cfg!(feature = "failpoints") {
            panic!("run with --features failpoints (make test does)");
        }
        let (host, name) = if side == IN { (&lab.world.client, "in") } else { (&lab.world.server, "out") };
        Self { lab, side, host, name }
    }

    /// New traffic of what is captured, which must not pass in plaintext. Returns what was seen.
    fn safe(&self, case: &str) -> [Seen; 2] {
        let seen = self.lab.each(|family| match self.side {
            IN => self.lab.exchange(family, &Connect::default()),
            _ => self.lab.plain(family),
        });
        assert!(seen.iter().all(|s| s.plaintext.is_none()), "{case}: {seen:?}");
        seen
    }

    /// The same, which must not be served at all.
    fn closed(&self, case: &str) -> [Seen; 2] {
        let seen = self.safe(case);
        assert!(seen.iter().all(|s| s.fate != Fate::Delivered), "{case}: {seen:?}");
        seen
    }

    fn before(&self, what: Before) {
        match what {
            Before::Nothing => {}
            Before::Killed => {
                let mut first = Tng::start(self.host, self.name, &usual(self.side));
                first.kill();
                first.wait();
            }
            Before::ClosedStop => {
                let first = Tng::start(self.host, self.name, &closed_on_stop(self.side));
                assert!(first.stop().success(), "a clean stop");
            }
        }
    }

    /// A run that must not succeed.
    fn fails(&self, toml: &str, failpoint: &str) {
        let mut run = Tng::spawn_with(self.host, self.name, toml, &[], &[("TNG_FAILPOINT", failpoint)]);
        let status = run.wait();
        assert!(!status.success(), "{failpoint}: {}", run.output());
    }

    /// A command about the instance's file to its end.
    fn command(&self, program: std::path::PathBuf, verb: &[&str], toml: &str, failpoint: &str) -> Output {
        let file = self.host.config_dir().join(format!("{}.toml", self.name));
        std::fs::write(&file, toml).expect("write the configuration");
        let words = [verb, &[self.name]].concat();
        let mut command = self.host.command(program, &words);
        command.env("TNG_FAILPOINT", failpoint);
        run(command)
    }
}

fn closed_on_stop(side: &str) -> String {
    format!("on_stop = \"closed\"\n{}", usual(side))
}

fn cannot_listen(lab: &Lab, side: &'static str, before: Before) -> Outcome {
    let scene = Scene::new(lab, side);
    let app = if side == IN { &lab.client } else { &lab.server };
    app.listen(IpAddr::V4(Ipv4Addr::LOCALHOST), TAKEN, json!({}));
    scene.before(before);
    let toml = if before == Before::Killed { usual(side) } else { closed_on_stop(side) };
    scene.fails(&format!("{toml}\n{}", listening(side, TAKEN)), "");
    scene.closed("the port is taken").into()
}

fn file_with_errors(lab: &Lab, side: &'static str) -> Outcome {
    let scene = Scene::new(lab, side);
    scene.before(Before::Killed);
    scene.fails(BROKEN, "");
    scene.closed("a file with errors").into()
}

/// Steps of a start, but for those of the data plane.
const RULES: [&str; 7] =
    ["guard.start", "guard.loaded", "net-up.rule", "net-up.route", "net-up.nft", "net-up.record", "net-up.done"];

/// A start whose file captures something else, over the rules of a killed life.
fn start_over(lab: &Lab, side: &'static str, action: &str) -> Outcome {
    let scene = Scene::new(lab, side);
    scene.before(Before::Killed);
    let data_plane = (action == "kill").then_some(["serve.bound", "serve.ready"]);
    for point in RULES.into_iter().chain(data_plane.into_iter().flatten()) {
        scene.fails(&other(side), &format!("{point}={action}"));
        scene.closed(point);
    }
    scene.closed("all of them").into()
}

/// What a first start refuses that was killed behind its transaction, and what the next one did, is closed for all that
/// follow.
fn half_start(lab: &Lab, side: &'static str) -> Outcome {
    let scene = Scene::new(lab, side);
    for (toml, point) in
        [(usual(side), "net-up.applied"), (other(side), "net-up.applied"), (other(side), "net-up.done")]
    {
        scene.fails(&toml, &format!("{point}=kill"));
        scene.closed(point);
    }
    let third = other(side).replace("8999", "8998").replace("\"other\"", "\"third\"");
    for action in ["error", "kill"] {
        scene.fails(&third, &format!("net-up.done={action}"));
        scene.closed(action);
    }
    scene.closed("all of them").into()
}

fn net_up(lab: &Lab, side: &'static str) -> Outcome {
    let scene = Scene::new(lab, side);
    scene.before(Before::Killed);
    let up = |toml: &str, failpoint: &str| {
        let out = scene.command(tngd(), &["net", "up"], toml, failpoint);
        assert!(!out.ok(), "{failpoint}: {}", out.stderr);
        scene.closed(failpoint)
    };
    up(BROKEN, "");
    for point in &RULES[2..] {
        up(&other(side), &format!("{point}=error"));
    }
    // Killed behind its transaction it has done what was asked.
    for point in ["net-up.rule", "net-up.route", "net-up.nft"] {
        up(&other(side), &format!("{point}=kill"));
    }
    scene.closed("all of them").into()
}

fn reload_refused(lab: &Lab, side: &'static str) -> Outcome {
    let scene = Scene::new(lab, side);
    let _egress = (side == IN).then(|| lab.start_egress());
    let refusing = [("TNG_FAILPOINT", "reload.daemon=error")];
    let tng = Tng::spawn_with(scene.host, scene.name, &both(side), &[], &refusing);
    tng.wait_ready();
    for toml in [&other(side), &mapping(side), BROKEN] {
        let out = scene.command(tngctl(), &["reload"], toml, "");
        assert!(!out.ok(), "{toml}: {}", out.stderr);
        scene.safe(toml);
    }
    scene.safe("all of them").into()
}

/// A reload to a file without the usual capture, which fails or is killed at every step.
fn reload(lab: &Lab, side: &'static str, to: fn(&str) -> String, action: &str) -> Outcome {
    let scene = Scene::new(lab, side);
    let _egress = (side == IN).then(|| lab.start_egress());
    let tng = Tng::start(scene.host, scene.name, &both(side));
    for point in ["reload.guard", "reload.rules"].iter().chain(&RULES[2..]).chain(&["reload.narrow", "reload.narrowed"])
    {
        let out = scene.command(tngctl(), &["reload"], &to(side), &format!("{point}={action}"));
        assert!(!out.ok(), "{point}: {}", out.stderr);
        scene.safe(point);
        let back = scene.command(tngctl(), &["reload"], &both(side), "");
        assert!(back.ok(), "back after {point}: {}\n{}", back.stderr, tng.output());
    }
    scene.safe("all of them").into()
}
