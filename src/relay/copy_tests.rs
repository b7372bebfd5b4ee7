//! The relay over in-process pipes, where every wait can be forced.

use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use prometheus_client::metrics::counter::Counter;
use proptest::prelude::*;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream, ReadBuf, duplex};
use tokio_util::sync::CancellationToken;

use super::{End, Flow, Leg, Meter, RelayOptions, relay};

#[derive(Default)]
struct Counted {
    inward: AtomicU64,
    outward: AtomicU64,
    total: Counter,
}

impl Counted {
    fn meter(&self) -> Meter<'_> {
        Meter {
            into_tunnel: Flow { connection: &self.inward, endpoint: &self.total },
            out_of_tunnel: Flow { connection: &self.outward, endpoint: &self.total },
        }
    }
}

const FOREVER: RelayOptions<'static> = RelayOptions { idle: None, unacknowledged: None, standing: None };

/// A pipe whose reads fail with `fail` once its writer is gone, and that notes an abort.
struct Dying {
    pipe: DuplexStream,
    fail: io::ErrorKind,
    aborted: bool,
}

impl Dying {
    fn new(pipe: DuplexStream, fail: io::ErrorKind) -> Self {
        Self { pipe, fail, aborted: false }
    }
}

impl AsyncRead for Dying {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        match Pin::new(&mut self.pipe).poll_read(cx, buf) {
            Poll::Ready(Ok(())) if buf.filled().len() == before => Poll::Ready(Err(self.fail.into())),
            other => other,
        }
    }
}

impl AsyncWrite for Dying {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.pipe).poll_write(cx, buf)
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.pipe).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.pipe).poll_shutdown(cx)
    }
}

impl Leg for Dying {
    fn abort(&mut self) {
        self.aborted = true;
    }
}

/// How a relay ends whose tunnel sends `bytes` and then fails with `fail`.
async fn dying_tunnel(fail: io::ErrorKind) -> (End, Vec<u8>, bool, bool) {
    let (plain, mut app) = duplex(1024);
    let (tunnel, mut peer) = duplex(1024);
    let (mut plain, mut tunnel) = (Dying::new(plain, io::ErrorKind::ConnectionReset), Dying::new(tunnel, fail));
    peer.write_all(b"last words").await.expect("write");
    drop(peer);
    let counted = Counted::default();
    let end = relay(&mut plain, &mut tunnel, FOREVER, counted.meter(), &CancellationToken::new()).await;
    let aborted = (plain.aborted, tunnel.aborted);
    drop(plain);
    let mut heard = Vec::new();
    app.read_to_end(&mut heard).await.expect("read");
    (end, heard, aborted.0, aborted.1)
}

#[tokio::test]
async fn a_dying_tunnel_aborts_both_sides_after_its_last_words() {
    let (end, heard, plain, tunnel) = dying_tunnel(io::ErrorKind::UnexpectedEof).await;
    assert!(matches!(end, End::Truncated), "{end:?}");
    assert!(plain && tunnel);
    assert_eq!(heard, b"last words");
    assert!(matches!(dying_tunnel(io::ErrorKind::InvalidData).await.0, End::Corrupt(_)));
    assert!(matches!(dying_tunnel(io::ErrorKind::ConnectionReset).await.0, End::Tunnel(_)));
}

#[tokio::test]
async fn a_clean_end_aborts_nothing() {
    let (plain, mut app) = duplex(64);
    let (tunnel, mut peer) = duplex(64);
    let counted = Counted::default();
    let token = CancellationToken::new();
    let (mut plain, mut tunnel) = (plain, tunnel);
    let both = async {
        app.write_all(b"ask").await.expect("write");
        app.shutdown().await.expect("shutdown");
        let mut asked = Vec::new();
        peer.read_to_end(&mut asked).await.expect("read");
        assert_eq!(asked, b"ask");
        peer.write_all(b"answer").await.expect("write");
        peer.shutdown().await.expect("shutdown");
        let mut answer = Vec::new();
        app.read_to_end(&mut answer).await.expect("read");
        assert_eq!(answer, b"answer");
    };
    let (end, ()) = tokio::join!(relay(&mut plain, &mut tunnel, FOREVER, counted.meter(), &token), both);
    assert!(matches!(end, End::Closed), "{end:?}");
    assert_eq!((counted.inward.load(Ordering::Relaxed), counted.outward.load(Ordering::Relaxed)), (3, 6));
}

#[tokio::test]
async fn a_reader_that_stops_stops_its_writer() {
    let (mut plain, mut app) = duplex(1024);
    let (mut tunnel, peer) = duplex(1024);
    let counted = Counted::default();
    let token = CancellationToken::new();
    let flood = async {
        let chunk = [1; 1024];
        let mut sent = 0;
        while let Ok(Ok(())) = tokio::time::timeout(Duration::from_millis(100), app.write_all(&chunk)).await {
            sent += chunk.len();
            assert!(sent < 1024 * 1024, "nothing holds the writer back");
        }
        token.cancel();
        sent
    };
    let (end, sent) = tokio::join!(relay(&mut plain, &mut tunnel, FOREVER, counted.meter(), &token), flood);
    assert!(matches!(end, End::Drained), "{end:?}");
    assert!(sent <= 2 * 1024 + super::buffer::SCRATCH, "{sent} bytes were taken for a reader that reads none");
    drop(peer);
}

#[tokio::test(start_paused = true)]
async fn the_idle_deadline_counts_from_the_last_byte() {
    let (mut plain, mut app) = duplex(64);
    let (mut tunnel, mut peer) = duplex(64);
    let counted = Counted::default();
    let token = CancellationToken::new();
    let options = RelayOptions { idle: Some(Duration::from_secs(60)), unacknowledged: None, standing: None };
    let started = tokio::time::Instant::now();
    let talk = async {
        tokio::time::sleep(Duration::from_secs(50)).await;
        app.write_all(b"x").await.expect("write");
        let mut byte = [0];
        peer.read_exact(&mut byte).await.expect("read");
    };
    let (end, ()) = tokio::join!(relay(&mut plain, &mut tunnel, options, counted.meter(), &token), talk);
    assert!(matches!(end, End::Idle(_)), "{end:?}");
    let lasted = started.elapsed().as_secs();
    assert!((109..=111).contains(&lasted), "{lasted} s");
}

#[test]
fn an_idle_relay_holds_little() {
    let (mut plain, _app) = duplex(64);
    let (mut tunnel, _peer) = duplex(64);
    let counted = Counted::default();
    let token = CancellationToken::new();
    let future = relay(&mut plain, &mut tunnel, FOREVER, counted.meter(), &token);
    let size = std::mem::size_of_val(&future);
    assert!(size <= 1024, "{size} bytes");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    /// Whatever the sizes of writes and of the pipes on the way, both directions arrive whole.
    #[test]
    fn any_split_arrives_whole(
        up in proptest::collection::vec(any::<u8>(), 0..200_000),
        down in proptest::collection::vec(any::<u8>(), 0..200_000),
        pipes in (1usize..70_000, 1usize..70_000),
        step in 1usize..50_000,
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
        runtime.block_on(async {
            let (mut plain, app) = duplex(pipes.0);
            let (mut tunnel, peer) = duplex(pipes.1);
            let counted = Counted::default();
            let token = CancellationToken::new();
            let talk = |stream: DuplexStream, say: Vec<u8>| async move {
                let (mut reader, mut writer) = tokio::io::split(stream);
                let saying = async {
                    for part in say.chunks(step) {
                        writer.write_all(part).await.expect("write");
                    }
                    writer.shutdown().await.expect("shutdown");
                };
                let mut heard = Vec::new();
                let (_, result) = tokio::join!(saying, reader.read_to_end(&mut heard));
                result.expect("read");
                heard
            };
            let (end, app_heard, peer_heard) = tokio::join!(
                relay(&mut plain, &mut tunnel, FOREVER, counted.meter(), &token),
                talk(app, up.clone()),
                talk(peer, down.clone()),
            );
            assert!(matches!(end, End::Closed), "{end:?}");
            assert!(app_heard == down && peer_heard == up);
        });
    }
}
