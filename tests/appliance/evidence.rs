//! The helper that makes evidence of the host: who may ask it, for what, and what it may do itself.

use super::pair::Pair;

const SOCKET: &str = "/run/tng/evidence.sock";
/// What `systemd-analyze security` may find at most; in tenths.
const EXPOSURE: u32 = 14;
/// Sends the bytes that its argument evaluates to and prints the answer.
const CLIENT: &str = "import socket, sys
s = socket.socket(socket.AF_UNIX)
s.settimeout(40)
s.connect('/run/tng/evidence.sock')
s.sendall(eval(sys.argv[1]))
s.shutdown(socket.SHUT_WR)
while more := s.recv(65536):
    print(more.decode(), end='')
";

/// One request, one answer, by the group alone.
pub fn helper(pair: &Pair) {
    let host = &pair.server;
    if !pair.settle() {
        return;
    }
    let ask = |user: &str, group: &str, bytes: &str| {
        host.try_sh(&format!(
            "setpriv --reuid {user} --regid {group} --clear-groups --bounding-set=-all python3 -I /usr/local/bin/ask \"{bytes}\""
        ))
    };
    pair.point("tng-evidence.socket is the group's: user tng is answered, anybody else is not let in", || {
        host.write("/usr/local/bin/ask", CLIENT);
        host.sh("systemctl enable --now tng-evidence.socket 2>&1");
        assert_eq!(host.sh(&format!("stat -c '%a %U:%G' {SOCKET}")).trim(), "660 root:tng");
        let quote = ask("tng", "tng", "b'tngE' + bytes([1, 2, 0, 0]) + bytes(64)");
        // A container has no TPM; the helper says so, and is not kept from looking.
        assert!(quote.stdout.starts_with("{\"failure\":{\"tpm-unreachable\":\"/dev/tpmrm0: No such file"), "{quote:?}");
        let report = ask("tng", "tng", "b'tngE' + bytes([1, 1, 0, 0]) + bytes(64)");
        assert!(report.stdout.starts_with("{\"failure\":{\"tsm-absent\":"), "{report:?}");
        let more = ask("tng", "tng", "b'tngE' + bytes([1, 2, 0, 0]) + bytes(65)");
        assert!(more.stdout.starts_with("{\"failure\":{\"helper-refused\":"), "{more:?}");
        let stranger = ask("nobody", "nogroup", "b''");
        assert!(stranger.stderr.contains("PermissionError"), "{stranger:?}");
        quote.stdout
    });
    pair.point("tng-evidence@.service: systemd-analyze security is at most 1.4, and no failed instance stays", || {
        let text = host.sh("systemd-analyze security --no-pager tng-evidence@x.service");
        let line = text.lines().find(|line| line.contains("Overall exposure level")).expect("overall line");
        let level = line.split_whitespace().find_map(|word| word.parse::<f32>().ok()).expect("a level");
        assert!((level * 10.0).round() as u32 <= EXPOSURE, "{line}");
        assert_eq!(host.sh("systemctl list-units --all --no-legend --plain 'tng-evidence@*'").trim(), "");
        level.to_string()
    });
    host.try_sh("systemctl disable --now tng-evidence.socket; rm -f /usr/local/bin/ask");
}
