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
        tracing::debug!("detail");
    }
}

#[test]
fn a_pipe_gets_json_lines() {
    let lines = lines(&[]);
    assert_eq!(lines.len(), 1, "{lines:?}");
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
    assert_eq!(lines(&[("TNG_LOG", "tng::access=off,warn")]).len(), 0);
    let wrong = lines(&[("TNG_LOG", "tng=loudest")]);
    assert!(wrong.iter().any(|l| l.contains("TNG_LOG is not understood")), "{wrong:?}");
    assert!(wrong.iter().any(|l| l.contains("\"closed\"")), "{wrong:?}");
}
