//! The table: what is measured, on which inputs, and what is to be reached.

mod change;
mod convert;
mod look;
mod requests;

use crate::bare::Bare;

/// One line of the table. Commands are words. In them `{o}` stands for the output, which is deleted before each run,
/// `{huge}` and `{data}` for sizes in bytes, `{data_mib}` for the latter in MiB.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Row {
    pub(crate) name: &'static str,
    /// Inputs that must be there.
    pub(crate) needs: &'static [&'static str],
    /// Run before each measured run, untimed, with the reference.
    pub(crate) before: &'static [&'static str],
    /// Inputs, and what each is copied to before each measured run, untimed.
    pub(crate) copies: &'static [(&'static str, &'static str)],
    /// The measured commands, one behind the other.
    pub(crate) commands: &'static [&'static str],
    /// How often the commands are repeated within one measured run.
    pub(crate) times: u32,
    /// What the reference must answer with success afterwards: that the output reads as it should.
    pub(crate) proof: Option<&'static str>,
    /// The same bytes without a format, where they are what the row costs.
    pub(crate) bare: Option<Bare>,
    /// Ratios to reach: CPU time, wall clock.
    pub(crate) target: (f64, f64),
}

const ROW: Row = Row {
    name: "",
    needs: &[],
    before: &[],
    copies: &[],
    commands: &[],
    times: 1,
    proof: None,
    bare: None,
    target: (1.0, 1.0),
};

/// All rows, in the order of the document.
pub(crate) fn all() -> impl Iterator<Item = &'static Row> {
    [look::ROWS, change::ROWS, convert::ROWS, requests::ROWS].into_iter().flatten()
}
