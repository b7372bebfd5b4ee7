//! The attestation agent's socket, which is root's alone, and the packaged way to it.

use super::netns::wait_for;
use super::pair::{EGRESS, HEAL, Pair};

/// Where CoCo's agent listens.
const SOCKET: &str = "/run/confidential-containers/attestation-agent/attestation-agent.sock";
/// The way to it that the package has.
const PROXY: &str = "/run/tng/aa.sock";
/// A unit as the agent's own: root, and a socket that only root may connect to.
const AGENT: &str = "[Service]
UMask=0022
Environment=TNG_TEST_FIXTURES=/run/fixtures
ExecStartPre=/usr/bin/mkdir -p /run/confidential-containers/attestation-agent
ExecStart=/usr/local/bin/fake_aa /run/confidential-containers/attestation-agent/attestation-agent.sock
";

/// What the agent answers, as it was recorded.
const RECORDED: &str = include_str!("../fixtures/coco/aa-ttrpc-wire.txt");

/// The test suite's agent, which answers byte for byte as CoCo's does; `cargo build --example fake_aa` makes it.
pub fn program() -> std::path::PathBuf {
    let test = std::env::current_exe().expect("the test's own path");
    test.parent().and_then(|deps| deps.parent()).expect("target directory").join("examples/fake_aa")
}

/// Refused without the proxy; `tngctl doctor` knows the command, and after it the tunnel has the agent's evidence.
pub fn reachable(pair: &Pair) {
    let host = &pair.server;
    if !pair.settle() {
        return;
    }
    let doctor = || {
        let out = host.try_sh("tngctl doctor egress");
        (out.status.code(), format!("{}{}", out.stdout, out.stderr))
    };
    let mut fix = None;
    pair.point(
        "the agent's socket is root's: user tng is refused, and tngctl doctor says so and how to mend it",
        || {
            host.install_program(&program(), "/usr/local/bin/fake_aa");
            host.write("/run/fixtures/aa-ttrpc-wire.txt", RECORDED);
            host.write("/run/systemd/system/attestation-agent.service", AGENT);
            host.sh("systemctl daemon-reload; systemctl start attestation-agent");
            wait_for("the agent's socket", HEAL, || host.holds(&format!("test -S {SOCKET}")));
            // As the data plane's user, with no more than it has.
            let program = format!("import socket; socket.socket(socket.AF_UNIX).connect('{SOCKET}')");
            let refused =
                host.try_sh(&format!("setpriv --reuid tng --regid tng --clear-groups python3 -I -c \"{program}\""));
            assert!(refused.stderr.contains("PermissionError"), "user tng reaches it: {refused:?}");
            let text = EGRESS.replace("provider = \"sample\"", &format!("aa_addr = \"unix://{SOCKET}\""));
            host.write("/etc/tng/egress.toml", &text);
            let (code, said) = doctor();
            assert_ne!(code, Some(0), "{said}");
            let command = said
                .lines()
                .find_map(|line| line.trim().strip_prefix("fix: ").filter(|c| c.contains("tng-aa-proxy.socket")));
            fix = Some(command.unwrap_or_else(|| panic!("no command about the proxy:\n{said}")).to_owned());
            fix.clone().unwrap_or_default()
        },
    );
    pair.point("the command that doctor names, run as it stands: the tunnel serves with the agent's evidence", || {
        host.sh(fix.as_ref().expect("a command"));
        assert_eq!(host.sh(&format!("stat -c '%a %U:%G' {PROXY}")).trim(), "660 root:tng");
        host.sh("systemctl restart tng@egress");
        pair.wait_served();
        let (_, said) = doctor();
        assert!(!said.contains("[aa-"), "doctor still complains about the agent:\n{said}");
        let status = host.sh("tngctl status egress");
        assert!(status.contains(PROXY), "{status}");
        status.lines().find(|line| line.contains(PROXY)).unwrap_or_default().trim().to_owned()
    });
    host.try_sh("systemctl disable --now tng-aa-proxy.socket tng-aa-proxy.service; systemctl stop attestation-agent; rm -rf /usr/local/bin/fake_aa /run/fixtures /run/systemd/system/attestation-agent.service /run/confidential-containers; systemctl daemon-reload");
    host.write("/etc/tng/egress.toml", EGRESS);
    host.try_sh("systemctl restart tng@egress");
}
