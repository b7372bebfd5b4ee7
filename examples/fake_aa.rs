//! A fake attestation agent for network tests: `fake_aa SOCKET [MODE]`.

#[path = "../tests/fakes/mod.rs"]
mod fakes;

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let mut args = std::env::args().skip(1);
    let socket = args.next().expect("usage: fake_aa SOCKET [MODE]");
    let mode = args.next().map_or(fakes::aa::Mode::Good, |m| m.parse().unwrap());
    let _agent = fakes::aa::FakeAa::start(socket.as_ref(), mode);
    println!("ready");
    std::future::pending::<()>().await;
}
