//! The harness itself: what it sees on the wire, what it refuses, and that it leaves nothing.

mod netns;

use std::time::Duration;

use netns::{Connect, Family, World, fresh_hex, wait_for};
use serde_json::json;

#[test]
fn plaintext_on_the_wire_is_seen_and_what_stays_on_the_host_is_not() {
    let world = World::new();
    let (client, server) = (world.client.app(), world.server.app());
    for family in Family::BOTH {
        let addr = world.server.addr(family);
        server.listen(addr, 8080, json!({}));
        let hex = fresh_hex();
        let conn = client.connect(&addr.to_string(), &Connect { port: 8080, ..Connect::default() }).expect("connect");
        client.send(conn, &format!("TNGQ{hex}\n")).expect("send");
        let answer = client.recv(conn, &format!("TNGA{hex}"), Duration::from_secs(2)).expect("answer");
        assert!(answer.contains(&world.client.addr(family).to_string()), "the server saw {answer}");
        assert_eq!(server.received(&hex).map(|(peer, _)| peer), Some(world.client.addr(family)));
        assert!(world.saw(&format!("TNGQ{hex}")), "{family:?}: the request was on the wire");
        assert!(world.saw(&format!("TNGA{hex}")), "{family:?}: the answer was on the wire");

        let local = fresh_hex();
        let conn = server.connect(&addr.to_string(), &Connect { port: 8080, ..Connect::default() }).expect("connect");
        server.send(conn, &format!("TNGQ{local}\n")).expect("send");
        server.recv(conn, &format!("TNGA{local}"), Duration::from_secs(2)).expect("answer");
        assert!(!world.saw(&local), "{family:?}: loopback is not the wire");
    }
}

#[test]
fn text_split_over_two_segments_is_seen() {
    let world = World::new();
    let (client, server) = (world.client.app(), world.server.app());
    for family in Family::BOTH {
        let addr = world.server.addr(family);
        server.listen(addr, 8080, json!({}));
        let hex = fresh_hex();
        let conn = client.connect(&addr.to_string(), &Connect { port: 8080, ..Connect::default() }).expect("connect");
        let (first, second) = hex.split_at(8);
        client.send(conn, &format!("TNGQ{first}")).expect("send");
        wait_for("the first half on the wire", Duration::from_secs(2), || world.saw(first));
        assert!(!world.saw(&hex), "half a text is not the text");
        client.send(conn, second).expect("send");
        client.recv(conn, &format!("TNGA{hex}"), Duration::from_secs(2)).expect("answer");
        assert!(world.saw(&hex), "{family:?}");
    }
}

#[test]
fn a_world_takes_its_processes_and_namespaces_with_it() {
    let world = World::new();
    let names: Vec<String> = world.hosts().iter().map(|h| h.netns().to_owned()).collect();
    let stray = world.server.sh("sleep 300 >/dev/null 2>&1 & echo $!");
    // A zombie counts as ended: whoever inherits it reaps it in its own time.
    let runs = || std::fs::read_to_string(format!("/proc/{}/stat", stray.trim())).is_ok_and(|s| !s.contains(") Z "));
    assert!(runs(), "the stray process runs");
    drop(world);
    for name in names {
        assert!(!std::path::Path::new("/run/netns").join(&name).exists(), "{name} is left");
    }
    wait_for("the stray process ends", Duration::from_secs(2), || !runs());
}
