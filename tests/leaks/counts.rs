//! What the kernel counts, and how the operator sees it: in the status, as JSON and as metrics.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::lab::{Lab, PORT, TO_SERVER, ask, ingress};
use super::netns::{Connect, Family, Host, Tng, fresh_hex, wait_for};
use super::table::Fate;

/// The guard counts every few seconds.
const COUNTED: Duration = Duration::from_secs(30);

/// One of the kernel's counters as `tngctl status --json` shows it.
fn counter(tng: &Tng<'_>, name: &str) -> u64 {
    let status: Value = serde_json::from_str(&tng.ctl(&["status", "--json"]).expect_ok()).expect("JSON");
    let counters = &status[0]["kernel"]["counters"];
    counters[name].as_u64().unwrap_or_else(|| panic!("no counter {name} in {counters}"))
}

/// Waits until the data plane's metrics have this line.
#[track_caller]
fn wait_metric(tng: &Tng<'_>, line: &str) {
    wait_for(line, COUNTED, || tng.get("/metrics").is_some_and(|text| text.lines().any(|l| l == line)));
}

/// How many packets a counting rule of ours has met.
fn packets(host: &Host, table: &str) -> u64 {
    let listing = host.sh(&format!("nft list table inet {table}"));
    let count = listing.split("counter packets ").nth(1).and_then(|rest| rest.split(' ').next());
    count.and_then(|n| n.parse().ok()).unwrap_or_else(|| panic!("no counter in {listing}"))
}

#[test]
fn a_socket_bound_to_a_device_is_refused_and_counted_and_is_no_captured_connection() {
    let lab = Lab::new();
    let tng = Tng::start(&lab.world.client, "in", &ingress(TO_SERVER));
    let text = tng.ctl(&["status"]).expect_ok();
    assert!(text.contains("no packets refused beside the endpoints' own"), "{text}");
    for family in Family::BOTH {
        let began = Instant::now();
        let how = json!({"do": "connect", "addr": lab.addr(family), "port": PORT, "device": "c0", "timeout": 20});
        let fault = lab.client.ask(how).expect_err("a bound socket is not captured");
        assert_eq!(fault.0, "ECONNREFUSED", "{family:?} after {:?}", began.elapsed());
    }
    assert_eq!(counter(&tng, "captured_in"), 0);
    // The SYN that was dropped and the one that was refused, of each family.
    let refused = counter(&tng, "refused") + counter(&tng, "guard_refused");
    let on_wire = counter(&tng, "on_wire") + counter(&tng, "guard_on_wire");
    assert!(on_wire >= 4 && refused == on_wire, "{on_wire} of {refused}");
    let text = tng.ctl(&["status"]).expect_ok();
    assert!(text.contains(&format!("{refused} packets refused beside the endpoints' own")), "{text}");
    assert!(text.contains(&format!("{on_wire} kept off a wire")), "{text}");
    wait_metric(
        &tng,
        &format!("tng_kernel_refused_packets_total{{endpoint=\"\",side=\"\",cause=\"on-wire\"}} {on_wire}"),
    );
    // What rules remember is no stranger's change.
    assert!(!tng.output().contains("rules-removed"), "{}", tng.output());

    let _egress = lab.start_egress();
    let seen = lab.each(|family| lab.exchange(family, &Connect::default()));
    assert!(seen.iter().all(|s| s.fate == Fate::Delivered && s.plaintext.is_none()), "unbound sockets: {seen:?}");
    assert_eq!(counter(&tng, "captured_in"), 2);
    wait_metric(&tng, "tng_kernel_captured_connections_total{endpoint=\"in\",side=\"ingress\"} 2");
}

#[test]
fn a_syn_that_is_sent_again_is_one_connection_captured() {
    let lab = Lab::new();
    let (client, server) = (&lab.world.client, &lab.world.server);
    let (into, out) = lab.start();
    // The listeners' answers are lost, so the clients send their SYNs again.
    let lose = |host: &Host, table: &str, device: &str| {
        host.nft(&format!(
            "table inet {table} {{\nchain c {{\ntype filter hook output priority filter;\n\
             oif {device} tcp sport {PORT} tcp flags & (syn | ack) == (syn | ack) counter drop\n}}\n}}\n"
        ));
    };
    lose(client, "lost", "lo");
    lose(server, "lost", "s0");
    for (app, host, tng, counted) in
        [(&lab.client, client, &into, "captured_in"), (&lab.router, server, &out, "captured_out")]
    {
        let before = packets(host, "lost");
        std::thread::scope(|scope| {
            for family in Family::BOTH {
                let how = json!({"do": "connect", "addr": lab.addr(family), "port": PORT, "timeout": 8});
                scope.spawn(move || app.ask(how));
            }
        });
        assert!(packets(host, "lost") >= before + 4, "each SYN was answered twice at least");
        assert_eq!(counter(tng, counted), 2, "{counted}");
    }
}

#[test]
fn what_is_not_tcp_and_what_comes_from_a_borrowed_port_is_counted_apart() {
    let lab = Lab::new();
    let (into, out) = lab.start();
    for family in Family::BOTH {
        lab.datagram(&lab.client, &lab.addr(family).to_string());
        let conn = lab
            .client
            .connect(&lab.addr(family).to_string(), &Connect { port: PORT, ..Connect::default() })
            .expect("tunnel");
        let hex = fresh_hex();
        assert_eq!(ask(&lab.client, conn, &hex), Fate::Delivered);
        let (peer, port) = lab.server.received(&hex).expect("the request");
        // As a client does that takes the port which the egress borrowed of it. A SYN belongs to the connection whatever its sequence number; other segments may be invalid to conntrack.
        let forged = json!({"do": "raw", "src": peer, "dst": lab.addr(family), "sport": port, "dport": PORT,
                            "flags": 2, "ack": 0});
        lab.router.ask(forged).expect("raw segment");
    }
    wait_for("both", Duration::from_secs(10), || counter(&out, "port_in_use") == 2);
    assert_eq!(counter(&out, "refused"), 2);
    assert_eq!((counter(&into, "not_tcp") + counter(&into, "guard_not_tcp"), counter(&into, "captured_in")), (2, 2));
    let text = into.ctl(&["status"]).expect_ok();
    assert!(text.contains("2 not TCP"), "{text}");
    wait_metric(&into, "tng_kernel_refused_packets_total{endpoint=\"\",side=\"\",cause=\"not-tcp\"} 2");
    wait_metric(&out, "tng_kernel_refused_packets_total{endpoint=\"\",side=\"\",cause=\"port-in-use\"} 2");
    // What the guard wrote down goes with it.
    let file = lab.world.client.runtime_dir().join(".net/in.counted.json");
    assert!(file.exists());
    assert!(into.stop().success());
    assert!(!file.exists());
}
