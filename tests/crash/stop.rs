//! Killed between SIGTERM and the end.

use nix::sys::signal::Signal;

use super::lab::PORT;
use super::netns::traces;
use super::scene::{closed, exchange, has_table, lab, recovers, spawn, start_egress, tunnelled, wait_guard_gone};

/// What stands after the kill.
#[derive(PartialEq)]
enum Left {
    /// The data plane was killed; its parent finished the stop that was asked for.
    Nothing,
    /// Rules, which refuse.
    Refusal,
    /// The table is gone, as the stop wanted; only what no packet meets is left.
    Remains,
}

const STEPS: &[(&str, Left)] = &[
    ("serve.drain", Left::Nothing),
    ("serve.drained", Left::Nothing),
    ("net-down.sockets", Left::Refusal),
    ("net-down.nft", Left::Refusal),
    ("net-down.route", Left::Remains),
    ("net-down.record", Left::Remains),
];

#[test]
fn a_stop_killed_at_any_step_lets_no_captured_connection_out_and_the_next_start_works() {
    let lab = lab();
    let _egress = start_egress(&lab);
    let host = &lab.world.client;
    for (point, left) in STEPS {
        let mut tng = spawn(&lab, point, "kill");
        tng.wait_ready();
        let seen = exchange(&lab, PORT);
        assert!(tunnelled(&seen), "{point}: before the stop: {seen:?}");
        let flows = lab.each(|family| lab.flow(family));
        tng.signal(Signal::SIGTERM);
        let status = tng.wait();
        wait_guard_gone(host);
        assert_eq!(status.success(), *left == Left::Nothing, "{point}: {status}\n{}", tng.output());
        assert_eq!(has_table(host), *left == Left::Refusal, "{point}: the capture table");
        match left {
            Left::Nothing => assert_eq!(traces(host), "", "{point}"),
            Left::Refusal => {
                let seen = exchange(&lab, PORT);
                assert!(closed(&seen), "{point}: {seen:?}");
            }
            Left::Remains => {}
        }
        for flow in flows {
            let seen = lab.say(flow);
            assert!(closed(std::slice::from_ref(&seen)), "{point}: the application's old connection: {seen:?}");
            lab.client.close(flow.conn);
        }
        recovers(&lab, point);
    }
}
