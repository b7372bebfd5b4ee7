//! A fake attestation service for network tests: `fake_as LISTEN [MODE] [rest|grpc|grpc-alone] [ephemeral]`. With an
//! ephemeral signer each start has a key of its own.

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
    let service = match args.next().as_deref() {
        None => FakeAs::start_as(&listen, mode, serves, None).await,
        Some("ephemeral") => FakeAs::start_with_its_own_key_as(&listen, mode, serves).await,
        Some(other) => panic!("unknown signer {other}"),
    };
    println!("ready {}", service.addr);
    std::future::pending::<()>().await;
}
