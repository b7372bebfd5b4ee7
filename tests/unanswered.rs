//! A control socket that a service manager holds open for a data plane that does not answer.

use std::process::Command;

/// In a mount namespace of its own: a systemd that knows tng@web, and its socket, which nobody serves.
const SCENE: &str = r##"
import os, socket, subprocess, sys, time
tngctl, active, sub, result = sys.argv[1:5]
os.makedirs("/run/systemd/system")
os.makedirs("/run/tng/web")
os.makedirs("/run/bin")
with open("/run/bin/systemctl", "w") as file:
    file.write(f"#!/bin/sh\necho LoadState=loaded; echo ActiveState={active}; echo SubState={sub}; echo Result={result}\n")
os.chmod("/run/bin/systemctl", 0o755)
held = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
held.bind("/run/tng/web/control.sock")
held.listen()
env = {k: v for k, v in os.environ.items() if k != "TNG_RUNTIME_DIR"}
env["PATH"] = "/run/bin:" + env["PATH"]
began = time.monotonic()
out = subprocess.run([tngctl, "status", "web"], env=env, capture_output=True, text=True)
print(time.monotonic() - began)
print(out.returncode)
print(out.stderr)
"##;

/// Seconds that `tngctl status web` took, its exit status, and what it said, with the unit in this state.
fn status(active: &str, sub: &str, result: &str) -> (f64, i32, String) {
    let script = format!("mount -t tmpfs tmpfs /run && exec python3 -c '{SCENE}' \"$@\"");
    let output = Command::new("unshare")
        .args(["--mount", "sh", "-c", &script, "sh", env!("CARGO_BIN_EXE_tngctl"), active, sub, result])
        .output()
        .expect("unshare: apt install util-linux");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "needs root and python3: {}", String::from_utf8_lossy(&output.stderr));
    let mut lines = text.lines();
    let took = lines.next().and_then(|l| l.parse().ok()).expect("seconds");
    let exit = lines.next().and_then(|l| l.parse().ok()).expect("exit status");
    (took, exit, lines.collect::<Vec<_>>().join("\n"))
}

#[test]
fn a_dead_data_plane_is_named_long_before_the_deadline_and_a_slow_one_is_waited_for() {
    let (soon, exit, said) = status("failed", "failed", "exit-code");
    assert_eq!(exit, 1, "{said}");
    for part in ["not answering", "tng@web.service is failed (failed, exit-code)", "journalctl -u tng@web"] {
        assert!(said.contains(part), "no {part:?} in {said}");
    }
    let (late, exit, said) = status("active", "running", "success");
    assert_eq!(exit, 1, "{said}");
    assert!(said.contains("no answer within 5 s"), "{said}");
    // Measured side by side: a loaded machine delays both.
    assert!(soon + 2.0 < late, "{soon} s, and {late} s for one that runs");
}
