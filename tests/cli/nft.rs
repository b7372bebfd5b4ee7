//! nft is missing, or fails in the middle.

use std::os::unix::fs::PermissionsExt;

use super::lab::{Lab, TO_SERVER, ingress};
use super::netns::{Connect, Host, Tng, kernel_state, run, tngctl, traces};
use super::table::Fate;
use super::tools::{daemon, expect, write};

/// A program in nft's place that fails at its `n`th call, once, and is nft at all others.
fn failing_at(host: &Host, n: usize) -> String {
    let dir = host.config_dir().with_file_name("nft");
    std::fs::create_dir_all(&dir).expect("directory");
    let (script, calls) = (dir.join("nft"), dir.join("calls"));
    let _ = std::fs::remove_dir_all(&calls);
    std::fs::create_dir(&calls).expect("directory");
    // mkdir(2) gives each number to one call only, also when two come at once: the guard looks while rules are applied.
    let text = format!(
        "#!/bin/sh\ni=1\nwhile ! mkdir {calls}/$i 2>/dev/null; do i=$((i + 1)); done\nif [ $i -eq {n} ] && [ ! -e {calls}/off ]; then\n\
         echo 'Error: no memory for this test' >&2; exit 1\nfi\nexec nft \"$@\"\n",
        calls = calls.display()
    );
    std::fs::write(&script, text).expect("script");
    std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).expect("executable");
    script.to_string_lossy().into_owned()
}

/// From now on the program is nft at every call. Says whether the failing call has come by then.
fn mend(host: &Host, n: usize) -> bool {
    let calls = host.config_dir().with_file_name("nft").join("calls");
    std::fs::write(calls.join("off"), "").expect("mark");
    calls.join(n.to_string()).exists()
}

#[test]
fn a_missing_nft_is_named_and_nothing_is_left() {
    let lab = Lab::new();
    let host = &lab.world.client;
    let file = write(host, "in", &ingress(TO_SERVER));
    let before = kernel_state(host);
    for args in [&["run"][..], &["net", "up"], &["guard"]] {
        let out = daemon(host, &[args, &[&file]].concat(), &[("TNG_NFT", "/nonexistent/nft")]);
        expect(&out, 1, &["/nonexistent/nft: not found; install it: apt install nftables", "[nft-missing]"]);
        assert_eq!(traces(host), "", "{args:?}");
    }
    assert_eq!(kernel_state(host), before);
}

/// However far the start got, the one call that failed ends it, and nothing is left.
#[test]
fn an_nft_that_fails_at_any_call_of_a_start_leaves_nothing() {
    let lab = Lab::new();
    let host = &lab.world.client;
    let file = write(host, "in", &ingress(TO_SERVER));
    let before = kernel_state(host);
    for command in ["run", "net-up"] {
        let args: &[&str] = if command == "run" { &["run", &file] } else { &["net", "up", &file] };
        let mut failures = 0;
        for n in 1.. {
            assert!(n < 30, "{command}: nft is called without end");
            let script = failing_at(host, n);
            let env = [("TNG_NFT", script.as_str())];
            if command == "run" {
                let mut tng = Tng::spawn_with(host, "in", &ingress(TO_SERVER), &[], &env);
                super::netns::wait_until(std::time::Duration::from_secs(15), || {
                    tng.is_ready() || tng.exited().is_some()
                });
                if tng.exited().is_none() {
                    assert!(tng.is_ready(), "call {n}: {}", tng.output());
                    let met = mend(host, n);
                    assert!(tng.stop().success());
                    assert_eq!(traces(host), "");
                    if met {
                        continue; // it met the guard, which looks again
                    }
                    break;
                }
                assert_eq!(tng.wait().code(), Some(1), "call {n}: {}", tng.output());
                assert!(tng.output().contains("nft-refused"), "call {n}: {}", tng.output());
            } else {
                let out = daemon(host, args, &env);
                if out.ok() {
                    daemon(host, &["net", "down", &file], &[]).expect_ok();
                    break;
                }
                expect(&out, 1, &["[nft-refused]", "no memory for this test"]);
            }
            failures += 1;
            assert_eq!(kernel_state(host), before, "{command}, call {n}");
            assert_eq!(traces(host), "", "{command}, call {n}");
        }
        assert!(failures >= 3, "{command}: only {failures} calls of nft were met");
    }
}

/// Until the data plane has the new configuration, the old one stays whole. After that both are covered, and the message
/// says so.
#[test]
fn an_nft_that_fails_at_any_call_of_a_reload_keeps_what_is_in_force() {
    let lab = Lab::new();
    let host = &lab.world.client;
    let (tng, _egress) = lab.start();
    let old = ingress(TO_SERVER);
    let new = ingress(&format!("{TO_SERVER}, {}", TO_SERVER.replace("8080", "9090")));
    let reload = |text: &str| {
        tng.write_config(text);
        run(host.command(tngctl(), &["reload", "in"])).expect_ok();
        kernel_state(host)
    };
    let (with_new, before) = (reload(&new), reload(&old));
    assert_ne!(with_new, before);
    let (mut kept, mut covered) = (0, 0);
    for n in 1.. {
        assert!(n < 30, "nft is called without end");
        tng.write_config(&new);
        let mut command = host.command(tngctl(), &["reload", "in"]);
        command.env("TNG_NFT", failing_at(host, n));
        let out = run(command);
        if out.ok() {
            break;
        }
        expect(&out, 1, &["[nft-refused]"]);
        if out.stderr.contains("the new configuration is in force") {
            covered += 1;
            expect(&out, 1, &["is still refused; try again: tngctl reload in"]);
            assert_eq!(reload(&new), with_new, "call {n}: the next reload completes this one");
            assert_eq!(reload(&old), before, "call {n}");
        } else {
            kept += 1;
            assert_eq!(kernel_state(host), before, "call {n}");
        }
        let seen = lab.each(|family| lab.exchange(family, &Connect::default()));
        assert!(seen.iter().all(|s| s.fate == Fate::Delivered && s.plaintext.is_none()), "call {n}: {seen:?}");
    }
    assert!(kept >= 2 && covered >= 2, "calls of nft that were met: {kept} before, {covered} after");
    assert!(tng.stop().success());
    assert_eq!(traces(host), "");
}
