//! A fake attestation service for network tests: `fake_as LISTEN [MODE] [rest|grpc|grpc-alone]`.

#[path = "../tests/fakes/mod.rs"]
mod fakes;

use fakes::as_rest::{FakeAs, Mode, Serves};

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let mut args = std::env::args().skip(1);
    let listen = args.next().expect("usage: fake_as LISTEN [MODE] [rest|grpc|grpc-alone]");
    let mode = args.next().map_or(Mode::Status("affirming"), |m| m.parse().unwrap());
    let serves = match args.next().as_deref() {
        None | Some("rest") => Serves::Rest,
        Some("grpc") => Serves::Grpc,
        Some("grpc-alone") => Serves::GrpcAlone,
        Some(other) => panic!("unknown protocol {other}"),
    };
    let service = FakeAs::start_as(&listen, mode, serves, None).await;
    println!("ready {}", service.addr);
    std::future::pending::<()>().await;
}
