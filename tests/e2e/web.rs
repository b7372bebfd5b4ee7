//! nginx and curl, captured on both sides.

use std::time::Duration;

use super::netns::{Family, Tng, World, fresh_hex};
use super::programs::*;

#[test]
fn unmodified_curl_reaches_unmodified_nginx_and_the_wire_shows_nothing() {
    let world = World::new();
    let nginx = Nginx::usual(&world.server);
    let get = |family| {
        let path = format!("/page-{}", fresh_hex());
        let got = curl(&world.client, &socket_addr(&world.server, family, 8080), &path);
        (path, got)
    };
    for family in Family::BOTH {
        let (path, got) = get(family);
        got.expect_ok();
        assert!(world.saw(&path), "{family:?}: without tng the request is on the wire");
    }
    let egress_text = egress(8080, "", ATTEST);
    let server = Tng::start(&world.server, "out", &egress_text);
    let client = Tng::start(&world.client, "in", &ingress(TO_SERVER, VERIFY));
    for family in Family::BOTH {
        let (path, got) = get(family);
        let own = world.client.addr(family).to_string();
        assert_eq!(got.expect_ok(), format!("from={own} port=8080 uri={path}\n"));
        nginx.expect_logged(&own, &path);
        assert!(!world.saw(&path), "{family:?}: with tng nothing is on the wire");
        let outsider = curl(&world.router, &socket_addr(&world.server, family, 8080), &path);
        assert!(!outsider.ok(), "{family:?}: a client without the tunnel got {}", outsider.stdout);
    }

    assert!(server.stop().success());
    for family in Family::BOTH {
        let (path, got) = get(family);
        assert!(!got.ok(), "{family:?}: the egress is gone and curl got {}", got.stdout);
        assert!(!world.saw(&path), "{family:?}: the ingress never falls back to plaintext");
    }
    let _server = Tng::start(&world.server, "out", &egress(8080, "preserve_source = false", ATTEST));
    for family in Family::BOTH {
        let (path, got) = get(family);
        let text = got.expect_ok();
        let host = world.server.addr(family);
        assert_eq!(text, format!("from={host} port=8080 uri={path}\n"), "with preserve_source = false");
        assert!(!world.saw(&path));
    }
    assert!(client.stop().success());
}

#[test]
fn a_large_download_arrives_as_it_was() {
    let mut world = World::new();
    world.stop_sniffing();
    let nginx = Nginx::usual(&world.server);
    let digest = noise(&world.server, &nginx.files().join("noise"), 64);
    let _server = Tng::start(&world.server, "out", &egress(8080, "", ATTEST));
    let client = Tng::start(&world.client, "in", &ingress(TO_SERVER, VERIFY));
    for family in Family::BOTH {
        let addr = socket_addr(&world.server, family, 8080);
        let got = world.client.dir().join("got");
        let line = format!(
            "timeout 60 curl -sS --noproxy '*' -o {} http://{addr}/files/noise --write-out '%{{size_download}}'",
            got.display()
        );
        assert_eq!(world.client.sh(&line), (64 << 20).to_string());
        assert_eq!(sha256(&world.client, &got), digest, "{family:?}");
    }
    let status: serde_json::Value = serde_json::from_str(&client.ctl(&["status", "--json"]).expect_ok()).expect("JSON");
    let down = status[0]["endpoints"][0]["counters"]["bytes_down"].as_u64().expect("bytes");
    assert!(down >= 2 * (64 << 20), "both downloads passed the tunnel: {down} bytes");
}

#[test]
fn fifty_curls_at_once_all_get_their_own_answer() {
    let world = World::new();
    let nginx = Nginx::usual(&world.server);
    let _server = Tng::start(&world.server, "out", &egress(8080, "", ATTEST));
    let client = Tng::start(&world.client, "in", &ingress(TO_SERVER, VERIFY));
    for family in Family::BOTH {
        let run = fresh_hex();
        let url = format!("http://{}/run-{run}-", socket_addr(&world.server, family, 8080));
        let answers =
            world.client.sh(&format!("seq 50 | xargs -P 50 -I N curl -sS --noproxy '*' --max-time 30 '{url}N'"));
        let own = world.client.addr(family).to_string();
        for n in 1..=50 {
            let uri = format!("/run-{run}-{n}");
            assert!(answers.contains(&format!("from={own} port=8080 uri={uri}\n")), "{uri} in\n{answers}");
            nginx.expect_logged(&own, &uri);
        }
    }
    super::netns::wait_for("all connections end", Duration::from_secs(10), || {
        client.ctl(&["status"]).expect_ok().contains("0 open, 100 in all, 0 refused")
    });
}

#[test]
fn both_sides_on_one_host() {
    let world = World::new();
    let host = &world.server;
    let nginx =
        Nginx::start(host, &["203.0.113.2:8080".into(), "127.0.0.1:8080".into(), "[2001:db8:2::2]:8080".into()]);
    let addrs = Family::BOTH.map(|family| socket_addr(host, family, 8080));
    for addr in &addrs {
        curl(host, addr, "/before").expect_ok();
    }
    let _out = Tng::start(host, "out", &egress(8080, "capture_local_traffic = true", ATTEST));
    for addr in &addrs {
        let plain = curl(host, addr, "/plain");
        assert!(!plain.ok(), "plaintext of this very host got {}", plain.stdout);
    }
    let mapping = |name: &str, listen: &str, target: &str| {
        format!(
            "[[ingress]]\nname = \"{name}\"\n[ingress.mapping]\nlisten = \"{listen}\"\ntarget = \"{target}\"\n{VERIFY}"
        )
    };
    let both = mapping("v4", "127.0.0.1:10001", &addrs[0]) + &mapping("v6", "[::1]:10001", &addrs[1]);
    let _in = Tng::start(host, "in", &both);
    for (listen, family) in [("127.0.0.1:10001", Family::V4), ("[::1]:10001", Family::V6)] {
        let path = format!("/one-host-{}", fresh_hex());
        let text = curl(host, listen, &path).expect_ok();
        assert!(text.ends_with(&format!("port=8080 uri={path}\n")), "{text}");
        // The tunnel comes from this host itself, and so does what the service sees.
        nginx.expect_logged(&host.addr(family).to_string(), &path);
    }
}
