//! Where log lines go and in which form.

use std::process::{Command, Stdio};

/// Lines on standard error of a child that logs one event, with these variables set.
fn lines(variables: &[(&str, &str)]) -> Vec<String> {
    let mut child = Command::new(std::env::current_exe().expect("own path"));
    child.args(["--exact", "child_logs", "--nocapture"]).env("TNG_TEST_CHILD", "1").env_remove("TNG_LOG");
    let output = child.envs(variables.iter().copied()).stderr(Stdio::piped()).output().expect("child");
    assert!(output.status.success());
    String::from_utf8(output.stderr).expect("text").lines().map(str::to_owned).collect()
}

#[test]
fn child_logs() {
    if std::env::var_os("TNG_TEST_CHILD").is_some() {
        tng::daemon::init_logging();
        tracing::info!(target: "tng::access", reason = "closed", bytes_up = 5, "connection");
        tracing::debug!(target: "tng::test", "detail");
        tracing::debug!(target: "rustls::client::hs", "certificate in hexadecimal");
        tracing::warn!(target: "h2::proto", "of a library");
        tracing::trace!(target: "tngx::almost", "almost ours");
        tng::daemon::flush_logging();
    }
}

#[test]
fn a_pipe_gets_json_lines() {
    let lines = lines(&[]);
    assert_eq!(lines.len(), 2, "{lines:?}");
    let line: serde_json::Value = serde_json::from_str(&lines[0]).expect("JSON");
    assert_eq!((&line["reason"], &line["bytes_up"]), (&"closed".into(), &5.into()));
    assert_eq!((&line["level"], &line["target"]), (&"INFO".into(), &"tng::access".into()));
}

#[test]
fn a_journal_that_is_not_standard_error_changes_nothing() {
    for stream in ["1:1", "nonsense", ""] {
        let lines = lines(&[("JOURNAL_STREAM", stream)]);
        serde_json::from_str::<serde_json::Value>(&lines[0]).expect("JSON");
    }
}

#[test]
fn the_level_is_chosen_and_a_wrong_one_is_said() {
    assert_eq!(lines(&[("TNG_LOG", "debug")]).iter().filter(|l| l.contains("\"detail\"")).count(), 1);
    assert_eq!(lines(&[("TNG_LOG", "tng::access=off,error")]).len(), 0);
    let wrong = lines(&[("TNG_LOG", "tng=loudest")]);
    assert!(wrong.iter().any(|l| l.contains("TNG_LOG is not understood")), "{wrong:?}");
    assert!(wrong.iter().any(|l| l.contains("\"closed\"")), "{wrong:?}");
}

#[test]
fn libraries_are_not_heard_below_info_whatever_is_asked_for() {
    for wanted in ["trace", "debug", "rustls=trace,h2=trace,tngx=trace,tng=trace,info"] {
        let lines = lines(&[("TNG_LOG", wanted)]);
        let said = |word: &str| lines.iter().any(|line| line.contains(word));
        assert!(said("\"detail\"") && said("of a library"), "{wanted}: {lines:?}");
        assert!(!said("hexadecimal") && !said("almost ours"), "{wanted}: {lines:?}");
    }
}

/// A journal's socket in a mount namespace of its own: prints what the child sends to it, and then what it wrote to
/// standard error.
const JOURNAL: &str = r#"
import os, socket, subprocess, sys
os.makedirs("/run/systemd/journal")
journal = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
journal.bind("/run/systemd/journal/socket")
with open("/run/stderr", "w+") as errors:
    stat = os.fstat(errors.fileno())
    env = dict(os.environ, JOURNAL_STREAM=f"{stat.st_dev}:{stat.st_ino}", TNG_TEST_CHILD="1")
    subprocess.run([sys.argv[1], "--exact", "child_logs", "--nocapture"], env=env, stderr=errors, check=True)
    journal.settimeout(5)
    entry = b""
    while not entry:  # the first datagram is empty: it asks whether a journal is there
        entry = journal.recv(65536)
    while entry:  # native protocol: KEY=VALUE, or KEY, a length of 8 bytes, VALUE
        line, entry = entry.split(b"\n", 1)
        if b"=" not in line:
            length = int.from_bytes(entry[:8], "little")
            line, entry = line + b"=" + entry[8:8 + length], entry[9 + length:]
        print(line.decode())
    errors.seek(0)
    print("STDERR=" + errors.read())
"#;

#[test]
fn the_journal_gets_structured_fields_and_standard_error_nothing() {
    let script = format!("mount -t tmpfs tmpfs /run && exec python3 -c '{JOURNAL}' \"$0\"");
    let exe = std::env::current_exe().expect("own path");
    let output = Command::new("unshare")
        .args(["--mount", "sh", "-c", &script])
        .arg(exe)
        .output()
        .expect("unshare: apt install util-linux");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "needs root and python3: {}", String::from_utf8_lossy(&output.stderr));
    for field in ["TNG_REASON=closed", "TNG_BYTES_UP=5", "MESSAGE=connection", "PRIORITY=5", "TARGET=tng::access"] {
        assert!(text.lines().any(|line| line == field), "{field} is not in:\n{text}");
    }
    assert!(text.contains("STDERR=\n") || text.trim_end().ends_with("STDERR="), "{text}");
}
