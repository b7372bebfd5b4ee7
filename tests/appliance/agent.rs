//! The attestation agent's socket, which is root's alone, and the packaged way to it.

use super::pair::{EGRESS, Pair};

/// Where CoCo's agent listens.
const SOCKET: &str = "/run/confidential-containers/attestation-agent/attestation-agent.sock";
/// The way to it that the package has.
const PROXY: &str = "/run/tng/aa.sock";
/// A socket with the mode that the agent's has; answers nothing, as reaching it is the point here.
const AGENT: &str = "import os, socket
path = '/run/confidential-containers/attestation-agent/attestation-agent.sock'
os.makedirs(os.path.dirname(path), exist_ok=True)
server = socket.socket(socket.AF_UNIX)
server.bind(path)
os.chmod(path, 0o755)
server.listen(8)
while True:
    conn, _ = server.accept()
    conn.sendall(b'agent')
    conn.close()
";

/// Refused without the proxy, reached with it, and `tngctl doctor` knows.
pub fn reachable(pair: &Pair) {
    let host = &pair.server;
    if !pair.settle() {
        return;
    }
    // As the data plane's user, with no more than it has.
    let connect = |socket: &str| {
        let program = format!(
            "import socket; s = socket.socket(socket.AF_UNIX); s.settimeout(10); s.connect('{socket}'); assert s.recv(9) == b'agent'"
        );
        host.try_sh(&format!(
            "setpriv --reuid tng --regid tng --clear-groups --bounding-set=-all python3 -I -c \"{program}\""
        ))
    };
    let doctor = || {
        let out = host.try_sh("tngctl doctor egress");
        (out.status.code(), format!("{}{}", out.stdout, out.stderr))
    };
    pair.point("the agent's socket is root's: user tng is refused, and tngctl doctor says so and what to do", || {
        host.write("/usr/local/bin/agent", AGENT);
        host.write(
            "/run/systemd/system/attestation-agent.service",
            "[Service]\nExecStart=/usr/bin/python3 -I /usr/local/bin/agent\n",
        );
        host.sh(&format!(
            "systemctl daemon-reload; systemctl start attestation-agent; until test -S {SOCKET}; do :; done"
        ));
        let refused = connect(SOCKET);
        assert!(refused.stderr.contains("PermissionError"), "user tng reaches it: {refused:?}");
        let text = EGRESS.replace("provider = \"sample\"", &format!("aa_addr = \"unix://{SOCKET}\""));
        host.write("/etc/tng/egress.toml", &text);
        let (code, said) = doctor();
        assert_ne!(code, Some(0), "{said}");
        assert!(said.contains(SOCKET) && said.contains("tng-aa-proxy.socket"), "{said}");
        said.lines().find(|line| line.contains("tng-aa-proxy.socket")).unwrap_or_default().trim().to_owned()
    });
    pair.point(
        "systemctl enable --now tng-aa-proxy.socket makes it reachable, and tngctl doctor is content with it",
        || {
            host.sh("systemctl enable --now tng-aa-proxy.socket 2>&1");
            assert_eq!(host.sh(&format!("stat -c '%a %U:%G' {PROXY}")).trim(), "660 root:tng");
            connect(PROXY).expect_ok();
            let text = EGRESS.replace("provider = \"sample\"", &format!("aa_addr = \"unix://{PROXY}\""));
            host.write("/etc/tng/egress.toml", &text);
            let (_, said) = doctor();
            assert!(!said.contains("PermissionError") && !said.contains("enable --now tng-aa-proxy"), "{said}");
            said.lines().find(|line| line.contains(PROXY)).unwrap_or_default().trim().to_owned()
        },
    );
    host.try_sh("systemctl disable --now tng-aa-proxy.socket tng-aa-proxy.service; systemctl stop attestation-agent; rm -rf /usr/local/bin/agent /run/systemd/system/attestation-agent.service /run/confidential-containers; systemctl daemon-reload");
    host.write("/etc/tng/egress.toml", EGRESS);
}
