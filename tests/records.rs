//! Every accepted connection ends in exactly one access record.

mod common;

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tracing::field::{Field, Visit};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};

type Fields = BTreeMap<String, String>;

#[derive(Clone, Default)]
struct Capture(Arc<Mutex<Vec<Fields>>>);

impl Capture {
    fn take(&self) -> Vec<Fields> {
        std::mem::take(&mut self.0.lock().expect("records"))
    }

    fn count(&self) -> usize {
        self.0.lock().expect("records").len()
    }
}

struct Visitor(Fields);

impl Visit for Visitor {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.0.insert(field.name().to_owned(), format!("{value:?}").trim_matches('"').to_owned());
    }
}

impl<S: tracing::Subscriber> Layer<S> for Capture {
    fn on_event(&self, event: &tracing::Event<'_>, _: Context<'_, S>) {
        if event.metadata().target() == "tng::access" {
            let mut visitor = Visitor(Fields::new());
            event.record(&mut visitor);
            self.0.lock().expect("records").push(visitor.0);
        }
    }
}

async fn exchange(pair: &Pair) -> TcpStream {
    let mut client = pair.client().await;
    let mut back = [0; 5];
    client.write_all(b"hello").await.expect("write");
    client.read_exact(&mut back).await.expect("echo");
    client
}

#[test]
fn one_record_for_each_connection_however_it_ends() {
    let capture = Capture::default();
    tracing::subscriber::set_global_default(tracing_subscriber::registry().with(capture.clone())).expect("subscriber");
    let runtime =
        || tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("runtime");

    let first = runtime();
    let source = first.block_on(async {
        let pair = Pair::to(echo().await);
        let client = exchange(&pair).await;
        let source = client.local_addr().expect("address");
        drop(client);
        eventually("both records", || capture.count() == 2).await;
        let records = capture.take();
        for (side, dst) in [("ingress", pair.tunnel), ("egress", "127.0.0.1:0".parse().expect("address"))] {
            let record = records.iter().find(|r| r["side"] == side).expect("record");
            assert_eq!(record["reason"], "closed");
            assert_eq!((record["bytes_up"].as_str(), record["bytes_down"].as_str()), ("5", "5"));
            assert_eq!((record["verdict"].as_str(), record["binding"].as_str()), ("none", "none"));
            if side == "ingress" {
                assert_eq!(record["src"], source.to_string());
                assert_eq!((&record["dst"], &record["peer"]), (&dst.to_string(), &dst.to_string()));
            }
        }
        source
    });
    assert_ne!(source.port(), 0);

    first.block_on(async {
        let refused = Pair::to(closed_port().await);
        for _ in 0..10 {
            if let Ok(mut client) = TcpStream::connect(refused.entry).await {
                let _ = client.read(&mut [0]).await;
            }
        }
        eventually("twenty records", || capture.count() == 20).await;
        let mut reasons = BTreeMap::new();
        for record in capture.take() {
            *reasons.entry((record["side"].clone(), record["reason"].clone())).or_insert(0) += 1;
        }
        assert_eq!(reasons[&("egress".to_owned(), "target-refused".to_owned())], 10);
        assert_eq!(reasons[&("ingress".to_owned(), "peer-reset".to_owned())], 10);
    });

    // A task that never gets to its end still leaves a record.
    let second = runtime();
    let held = second.block_on(async {
        let pair = Pair::to(echo().await);
        exchange(&pair).await
    });
    second.shutdown_timeout(Duration::from_secs(5));
    drop(held);
    let records = capture.take();
    assert_eq!(records.len(), 2, "{records:?}");
    assert!(records.iter().all(|r| r["reason"] == "aborted"), "{records:?}");
}
