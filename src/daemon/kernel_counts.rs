//! Metrics of the kernel's own counts, which the guard writes down for the data plane.

use std::fmt;
use std::sync::{Arc, Mutex};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;

use crate::capture::compile::{INJECTED, NOT_TCP, ON_WIRE, PORT_IN_USE, REFUSED};
use crate::capture::counted::Counts;
use crate::os::lock::Lock;

/// A captured endpoint's name and side.
pub type Captured = (String, String);

/// The counts of the whole instance, with the captured endpoints they are shown for.
#[derive(Debug, Clone, Default)]
pub struct KernelCounts(Arc<Mutex<(Vec<Captured>, Counts)>>);

/// What the packets refused beside the endpoints' own were, from [`Counts`]: cause and number. The capture table's and
/// the guard table's together.
pub fn shared_refusals(counts: &Counts) -> [(&'static str, u64); 5] {
    let both = |name: &str| count(counts, name) + count(counts, &format!("guard_{name}"));
    let parts = [
        ("not-tcp", both(NOT_TCP)),
        ("on-wire", both(ON_WIRE)),
        ("injected", both(INJECTED)),
        ("port-in-use", both(PORT_IN_USE)),
    ];
    let known: u64 = parts.iter().map(|(_, packets)| packets).sum();
    let [not_tcp, on_wire, injected, in_use] = parts;
    [not_tcp, on_wire, injected, in_use, ("undelivered", both(REFUSED).saturating_sub(known))]
}

fn count(counts: &Counts, name: &str) -> u64 {
    counts.get(name).copied().unwrap_or(0)
}

impl KernelCounts {
    /// Replaces them. Nothing is shown where nothing was counted: without captures, and without a guard.
    pub fn set(&self, captured: Vec<Captured>, counts: Option<Counts>) {
        *self.0.locked() = (captured, counts.unwrap_or_default());
    }
}

impl Collector for KernelCounts {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let (captured, counts) = self.0.locked().clone();
        if counts.is_empty() {
            return Ok(());
        }
        let idents: Vec<String> = captured.iter().map(|(name, _)| name.replace('-', "_")).collect();
        let help = "Connections that the kernel's rules captured, first SYNs alone";
        let mut family = encoder.encode_descriptor("kernel_captured_connections", help, None, MetricType::Counter)?;
        for ((endpoint, side), ident) in captured.iter().zip(&idents) {
            let counter = ConstCounter::new(count(&counts, &format!("captured_{ident}")));
            let labels = [("endpoint", endpoint.as_str()), ("side", side)];
            counter.encode(family.encode_family(&labels)?)?;
        }
        let help = "Packets that the kernel's rules refused; of the instance as a whole where endpoint is empty";
        let mut family = encoder.encode_descriptor("kernel_refused_packets", help, None, MetricType::Counter)?;
        for ((endpoint, side), ident) in captured.iter().zip(&idents) {
            let own = format!("refused_{ident}");
            let counter = ConstCounter::new(count(&counts, &own) + count(&counts, &format!("guard_{own}")));
            let labels = [("endpoint", endpoint.as_str()), ("side", side), ("cause", "endpoint")];
            counter.encode(family.encode_family(&labels)?)?;
        }
        for (cause, packets) in shared_refusals(&counts) {
            let labels = [("endpoint", ""), ("side", ""), ("cause", cause)];
            ConstCounter::new(packets).encode(family.encode_family(&labels)?)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use prometheus_client::encoding::text::encode;
    use prometheus_client::registry::Registry;

    use super::*;

    fn text(captured: Vec<Captured>, counts: Option<Counts>) -> String {
        let kernel = KernelCounts::default();
        kernel.set(captured, counts);
        let mut registry = Registry::with_prefix("tng");
        registry.register_collector(Box::new(kernel));
        let mut text = String::new();
        encode(&mut text, &registry).unwrap();
        text
    }

    #[test]
    fn counts_of_both_tables_are_shown_by_endpoint_and_cause() {
        let counts = [
            ("captured_my_api", 3),
            ("refused_my_api", 2),
            ("guard_refused_my_api", 5),
            ("refused", 9),
            ("not_tcp", 4),
            ("on_wire", 1),
            ("injected", 2),
            ("guard_refused", 7),
            ("guard_on_wire", 7),
        ];
        let counts: Counts = counts.into_iter().map(|(name, n)| (name.to_owned(), n)).collect();
        let shown = text(vec![("my-api".into(), "ingress".into())], Some(counts));
        for line in [
            "tng_kernel_captured_connections_total{endpoint=\"my-api\",side=\"ingress\"} 3\n",
            "tng_kernel_refused_packets_total{endpoint=\"my-api\",side=\"ingress\",cause=\"endpoint\"} 7\n",
            "tng_kernel_refused_packets_total{endpoint=\"\",side=\"\",cause=\"not-tcp\"} 4\n",
            "tng_kernel_refused_packets_total{endpoint=\"\",side=\"\",cause=\"on-wire\"} 8\n",
            "tng_kernel_refused_packets_total{endpoint=\"\",side=\"\",cause=\"injected\"} 2\n",
            "tng_kernel_refused_packets_total{endpoint=\"\",side=\"\",cause=\"undelivered\"} 2\n",
        ] {
            assert!(shown.contains(line), "no {line} in {shown}");
        }
        let without_a_guard = text(vec![("my-api".into(), "ingress".into())], None);
        assert!(!without_a_guard.contains("kernel"), "{without_a_guard}");
    }
}
