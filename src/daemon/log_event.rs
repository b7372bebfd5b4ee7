//! An event of tracing on its way to another thread: what it says, owned.

use std::fmt;

use tracing::field::{Field, Visit, display};
use tracing::{Dispatch, Event, Metadata, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;

use super::log_queue::{Item, push};

/// As many fields as tracing takes in one set.
const MAX_FIELDS: usize = 32;

/// An event and its fields.
pub(super) struct CapturedEvent {
    metadata: &'static Metadata<'static>,
    fields: Vec<(Field, Box<dyn tracing::field::Value + Send>)>,
}

impl CapturedEvent {
    fn of(event: &Event<'_>) -> Self {
        let mut captured = Self { metadata: event.metadata(), fields: Vec::new() };
        event.record(&mut captured);
        captured
    }

    /// Gives the event to another subscriber, as if it happened there.
    pub(super) fn replay(&self, to: &Dispatch) {
        let Some((first, _)) = self.fields.first() else { return };
        // A set has a fixed length; a field without a value is none.
        let values: [_; MAX_FIELDS] = std::array::from_fn(|at| match self.fields.get(at) {
            Some((field, value)) => (field, Some(&**value as &dyn tracing::field::Value)),
            None => (first, None),
        });
        let values = self.metadata.fields().value_set(&values);
        to.event(&Event::new(self.metadata, &values));
    }

    fn keep(&mut self, field: &Field, value: impl tracing::field::Value + Send + 'static) {
        self.fields.push((field.clone(), Box::new(value)));
    }
}

impl Visit for CapturedEvent {
    fn record_f64(&mut self, field: &Field, value: f64) {
        self.keep(field, value);
    }
    fn record_i64(&mut self, field: &Field, value: i64) {
        self.keep(field, value);
    }
    fn record_u64(&mut self, field: &Field, value: u64) {
        self.keep(field, value);
    }
    fn record_bool(&mut self, field: &Field, value: bool) {
        self.keep(field, value);
    }
    fn record_str(&mut self, field: &Field, value: &str) {
        self.keep(field, value.to_owned());
    }
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.keep(field, display(format!("{value:?}")));
    }
}

/// Puts events into the queue for the journal. Only there are they formatted.
pub(super) struct Forward;

impl<S: Subscriber> Layer<S> for Forward {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        push(Item::Event(Box::new(CapturedEvent::of(event))));
    }
}
