//! How far a job is, told as the user wishes; and signals while it runs.
//!
//! `SIGUSR1` prints one line on standard error at any time. `SIGINT` and `SIGTERM` ask the job to stop, so
//! that its command can clean up; a second one ends the process at once.

use std::{
    io,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicI32, AtomicU64, Ordering},
    },
    thread,
    time::Instant,
};

use img_core::{
    job::{Filling, Progress, Unwatched},
    storage::Watcher,
};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use signal_hook::{
    consts::{SIGINT, SIGTERM, SIGUSR1},
    iterator::Signals,
    low_level::emulate_default_handler,
};

use crate::{
    context::Context,
    created,
    error::Failure,
    output::{Out, complain},
};

/// How progress is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Style {
    /// Only when asked by signal.
    Hidden,
    /// The reference's `    (12.34/100%)` on standard output.
    Percent,
    /// One JSON object a line on standard output.
    Json,
    /// A bar on a terminal.
    Bar,
}

/// Shows the progress of one job.
#[derive(Debug)]
pub(crate) struct Reporter {
    style: Style,
    out: Out,
    /// Changes smaller than this many percent are not shown.
    step_percent: f64,
    shown: Mutex<Shown>,
    bar: Option<ProgressBar>,
    signals: Arc<Received>,
    started: Instant,
}

/// What was shown last.
#[derive(Debug)]
struct Shown {
    percent: f64,
    done: u64,
    total: u64,
}

/// What the thread that waits for signals knows and was told.
#[derive(Debug, Default)]
struct Received {
    /// The signal that asked to stop; 0 for none.
    stop: AtomicI32,
    /// Hundredths of percent behind us, for `SIGUSR1`.
    progress: AtomicU64,
}

impl Received {
    fn is_asked_to_stop(&self) -> bool {
        self.stop.load(Ordering::Relaxed) != 0
    }
}

impl Reporter {
    /// Starts listening to signals.
    pub(crate) fn start(style: Style, step_percent: f64, context: &Context) -> Result<Self, Failure> {
        let signals = Arc::new(Received::default());
        listen(Arc::clone(&signals))
            .map_err(|error| Failure::new(format!("Cannot handle signals: {error}")))?;
        let bar = (style == Style::Bar).then(|| {
            let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr());
            let template = "{bar:40} {bytes}/{total_bytes} {bytes_per_sec} {eta}";
            bar.set_style(ProgressStyle::with_template(template).expect("a fixed template is well-formed"));
            bar
        });
        Ok(Self {
            style,
            out: context.out.clone(),
            step_percent,
            shown: Mutex::new(Shown { percent: 0.0, done: 0, total: 0 }),
            bar,
            signals,
            started: Instant::now(),
        })
    }

    /// The work begins.
    pub(crate) fn begin(&self) {
        if self.style == Style::Percent {
            self.show_percent(0.0);
        }
    }

    /// The job has done all of its work.
    pub(crate) fn complete(&self) {
        match self.style {
            Style::Hidden | Style::Bar => {}
            Style::Percent => self.show_percent(100.0),
            Style::Json => {
                let (done, total) = {
                    let shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
                    (shown.done, shown.total)
                };
                self.show_json("finished", done, total, 100.0);
            }
        }
    }

    /// Nothing more is shown. With [`Style::Percent`] the line ends here, success or not.
    pub(crate) fn finish(&self) {
        match self.style {
            Style::Percent => self.out.line(""),
            Style::Bar => self.bar.iter().for_each(ProgressBar::finish_and_clear),
            Style::Hidden | Style::Json => {}
        }
    }

    /// Who knows whether the job is asked to stop, and tells nothing.
    pub(crate) fn stops(&self) -> Stops {
        Stops(Arc::clone(&self.signals))
    }

    /// Who tells of the writing of about so many bytes.
    pub(crate) fn of_filling(self: &Arc<Self>, total_bytes: u64) -> Arc<dyn Watcher> {
        Arc::new(Filling::new(Arc::clone(self), total_bytes))
    }

    /// How a job that was asked to stop ends.
    pub(crate) fn interrupted(&self) -> Option<Failure> {
        let signal = self.signals.stop.load(Ordering::Relaxed);
        u8::try_from(signal).ok().filter(|signal| *signal != 0).map(|signal| Failure::silent(128 + signal))
    }

    fn show_percent(&self, percent: f64) {
        self.out.print(format_args!("    ({percent:.2}/100%)\r"));
        self.out.flush();
    }

    fn show_json(&self, event: &str, done: u64, total: u64, percent: f64) {
        let elapsed_ms = self.started.elapsed().as_millis();
        self.out.line(format_args!(
            "{{\"event\":\"{event}\",\"done\":{done},\"total\":{total},\"percent\":{percent:.2},\
             \"elapsed_ms\":{elapsed_ms}}}"
        ));
        self.out.flush();
    }
}

/// Runs a job that `reporter`, where there is one, tells of.
///
/// # Errors
/// Of the job, or that it was asked to stop.
pub(crate) fn told<T>(
    reporter: Option<&Reporter>,
    job: impl FnOnce(&dyn Progress) -> Result<T, Failure>,
) -> Result<T, Failure> {
    let Some(reporter) = reporter else { return job(&Unwatched) };
    reporter.begin();
    let outcome = job(reporter);
    if outcome.is_ok() {
        reporter.complete();
    }
    reporter.finish();
    outcome.map_err(|failure| reporter.interrupted().unwrap_or(failure))
}

impl Progress for Reporter {
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "two decimals of a number between 0 and 100 are shown"
    )]
    fn advance(&self, done: u64, total: u64) {
        let percent = if total == 0 { 100.0 } else { (done as f64 * 100.0 / total as f64).min(100.0) };
        self.signals.progress.store((percent * 100.0) as u64, Ordering::Relaxed);
        if let Some(bar) = &self.bar {
            bar.set_length(total);
            bar.set_position(done);
        }
        if !matches!(self.style, Style::Percent | Style::Json) {
            return;
        }
        let mut shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        (shown.done, shown.total) = (done, total);
        // Threads may tell their progress out of order: what is shown never goes back.
        let is_news =
            percent > shown.percent + self.step_percent || (percent >= 100.0 && shown.percent < 100.0);
        if is_news {
            shown.percent = percent;
            match self.style {
                Style::Json => self.show_json("progress", done, total, percent),
                _ => self.show_percent(percent),
            }
        }
    }

    fn is_cancelled(&self) -> bool {
        self.signals.is_asked_to_stop()
    }
}

/// See [`Reporter::stops`].
#[derive(Debug)]
pub(crate) struct Stops(Arc<Received>);

impl Progress for Stops {
    fn advance(&self, _done: u64, _total: u64) {}

    fn is_cancelled(&self) -> bool {
        self.0.is_asked_to_stop()
    }
}

/// Starts the thread that waits for signals. It ends with the process.
fn listen(received: Arc<Received>) -> io::Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGUSR1])?;
    thread::Builder::new().name("signals".to_owned()).spawn(move || {
        for signal in signals.forever() {
            if signal == SIGUSR1 {
                let hundredths = received.progress.load(Ordering::Relaxed);
                complain(format_args!("    ({}.{:02}/100%)", hundredths / 100, hundredths % 100));
            } else if received.stop.swap(signal, Ordering::Relaxed) != 0 {
                // The user insists. Should that fail, the first request still stands.
                created::remove_all();
                emulate_default_handler(signal).ok();
            }
        }
    })?;
    Ok(())
}
