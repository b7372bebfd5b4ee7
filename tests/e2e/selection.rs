//! Whose traffic is taken, and what is left alone.

use super::netns::{Family, Tng, World, fresh_hex};
use super::programs::*;

#[test]
fn captured_by_user_others_go_the_direct_way() {
    let world = World::new();
    let _nginx = Nginx::usual(&world.server);
    let as_user = |uid: &str, family| {
        let path = format!("/user-{}", fresh_hex());
        let (reuid, regid) = (format!("--reuid={uid}"), format!("--regid={uid}"));
        let wrapper = ["setpriv", &reuid, &regid, "--clear-groups"];
        let got = curl_through(&wrapper, &world.client, &socket_addr(&world.server, family, 8080), &path);
        (got, world.saw(&path))
    };
    let out = Tng::start(&world.server, "out", &egress(8080, "", ATTEST));
    let _in = Tng::start(&world.client, "in", &ingress(&TO_SERVER.replace(" }", ", uid = 65534 }"), VERIFY));
    for family in Family::BOTH {
        let (got, plain) = as_user("65534", family);
        got.expect_ok();
        assert!(!plain, "{family:?}: that user's traffic is tunnelled");
        let (got, plain) = as_user("1", family);
        assert!(!got.ok() && plain, "{family:?}: another user's goes plain, and the egress refuses it");
    }
    assert!(out.stop().success());
    for family in Family::BOTH {
        let (got, plain) = as_user("1", family);
        got.expect_ok();
        assert!(plain, "{family:?}: another user reaches the service directly");
        let (got, plain) = as_user("65534", family);
        assert!(!got.ok() && !plain, "{family:?}: that user is refused and nothing leaks");
    }
}

#[test]
fn what_is_excluded_goes_the_direct_way() {
    let world = World::new();
    let listen: Vec<String> =
        [8080, 8081].iter().flat_map(|p| Family::BOTH.map(|f| socket_addr(&world.server, f, *p))).collect();
    let _nginx = Nginx::start(&world.server, &listen);
    let _out = Tng::start(&world.server, "out", &egress(8080, "", ATTEST));
    let wide = TO_SERVER.replace("port = 8080", "port = \"8080-8090\"");
    let exclude = format!("exclude = [{}]\n{VERIFY}", TO_SERVER.replace("8080", "8081"));
    let _in = Tng::start(&world.client, "in", &ingress(&wide, &exclude));
    for family in Family::BOTH {
        for (port, plain) in [(8080, false), (8081, true)] {
            let path = format!("/exclude-{}", fresh_hex());
            curl(&world.client, &socket_addr(&world.server, family, port), &path).expect_ok();
            assert_eq!(world.saw(&path), plain, "{family:?} port {port}");
        }
    }
}
