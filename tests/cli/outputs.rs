//! Outputs that nobody reads, or that take nothing: not the command's failure.

use super::lab::{TO_SERVER, ingress};
use super::netns::{Host, Parts, World, run, tngctl, tngd};
use super::tools::write;

/// The exit status of a command whose outputs go where `line` says; `$0` is the program.
fn status_of(host: &Host, program: &std::path::Path, line: &str) -> i32 {
    let file = host.dir().join("status");
    let line = format!("{line}; echo ${{PIPESTATUS[0]}} >{}", file.display());
    let out = run(host.command("bash", &["-c", &line, &program.to_string_lossy()]));
    let status = std::fs::read_to_string(&file).expect("status");
    status.trim().parse().unwrap_or_else(|_| panic!("{line}: {status}{}{}", out.stdout, out.stderr))
}

#[test]
fn a_reader_that_leaves_and_a_full_disk_leave_the_exit_status_as_it_is() {
    let world = World::new();
    let host = &world.client;
    let bad = write(host, "bad", "[[ingress]]\nnonsense = 1\n");
    let good = write(host, "good", &ingress(TO_SERVER).replace("8080", "8999"));
    let parts = Parts::new(host, "in", &ingress(TO_SERVER));
    parts.net_up();
    let serve = parts.serve();
    let outputs = ["2>&1 | true", "2>/dev/full", ">/dev/full", ">/dev/full 2>&1", ">&-", "2>&-", ">&- 2>&-"];
    let cases: &[(&std::path::Path, &str, i32)] = &[
        (&tngctl(), &format!("check {bad}"), 78),
        (&tngctl(), &format!("check {good}"), 0),
        (&tngctl(), &format!("check --json {bad}"), 78),
        (&tngctl(), &format!("rules {good}"), 0),
        (&tngctl(), "status --json in", 1),
        (&tngctl(), "connections in", 0),
        (&tngctl(), "status absent", 3),
        (&tngctl(), "reload absent", 78),
        (&tngctl(), "--help", 0),
        (&tngctl(), "nonsense", 2),
        (&tngctl(), "completions bash", 0),
        (&tngd(), &format!("check {bad}"), 78),
        (&tngd(), &format!("run {bad}"), 78),
        (&tngd(), "--version", 0),
        (&tngd(), "nonsense", 2),
    ];
    for (program, args, expected) in cases {
        let plain = status_of(host, program, &format!("\"$0\" {args} >/dev/null 2>&1"));
        assert_eq!(plain, *expected, "{args}: as it is");
        for output in outputs {
            let status = status_of(host, program, &format!("\"$0\" {args} {output}"));
            assert_eq!(status, *expected, "{args} {output}");
        }
    }
    // A watch ends with its reader, by the status of what it saw last.
    assert_eq!(status_of(host, &tngctl(), "timeout 20 \"$0\" status --watch in | head -n 1 >/dev/null"), 1);
    drop(serve);
}
