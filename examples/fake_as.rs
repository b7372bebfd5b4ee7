//! A fake attestation service for network tests: `fake_as LISTEN [MODE]`.

#[path = "../tests/fakes/mod.rs"]
mod fakes;

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let mut args = std::env::args().skip(1);
    let listen = args.next().expect("usage: fake_as LISTEN [MODE]");
    let mode = args.next().map_or(fakes::as_rest::Mode::Status("affirming"), |m| m.parse().unwrap());
    let service = fakes::as_rest::FakeAs::start(&listen, mode).await;
    println!("ready {}", service.addr);
    std::future::pending::<()>().await;
}
