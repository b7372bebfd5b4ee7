//! Memory goes back to the kernel when connections fall idle.

use std::sync::Weak;
use std::time::Duration;

use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use super::dataplane::DataPlane;

/// How often memory is given back; it costs about two milliseconds for a thousand connections.
const MEMORY_INTERVAL: Duration = Duration::from_secs(5);

/// Gives back what connections used while they were busy. Their buffers are freed as they drain, but
/// the allocator keeps pages that lie between used ones: about 10 KiB for each connection.
pub(super) async fn give_memory_back(plane: Weak<DataPlane>, stopping: CancellationToken) {
    let mut seen = 0;
    loop {
        tokio::select! {
            _ = stopping.cancelled() => return,
            _ = sleep(MEMORY_INTERVAL) => {}
        }
        let Some(plane) = plane.upgrade() else { return };
        let now = plane.activity();
        drop(plane);
        if now != seen {
            seen = now;
            let _ = tokio::task::spawn_blocking(crate::os::sys::release_free_memory).await;
        }
    }
}
