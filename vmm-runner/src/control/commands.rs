//! A run's commands and events.

use blk_backend::control::{
    Arguments, Block, Command, CommandError, Event, General, Member, NOTHING, Nodes, Outcome, Service, Shape,
    Subscribers, command, optional, required,
};
use serde_json::{Value, json};

use super::runner::Runner;
use crate::Error;

impl Service for Runner {
    const PACKAGE: &'static str = concat!("vmm-runner ", env!("CARGO_PKG_VERSION"));
    const COMMANDS: &'static [&'static [Command<Self>]] =
        &[General::<Self>::COMMANDS, Block::<Self>::COMMANDS, COMMANDS];
    const EVENTS: &'static [Event] = EVENTS;

    fn nodes(&self) -> &Nodes {
        &self.nodes
    }

    fn subscribers(&self) -> &Subscribers {
        &self.subscribers
    }

    fn log(&self, text: &str) {
        Self::tell(text);
    }
}

static COMMANDS: &[Command<Runner>] = &[
    command("query-status", NOTHING, STATUS, query_status),
    command("query-cpus-fast", NOTHING, CPU_LIST, query_cpus),
    command("stop", NOTHING, NOTHING, |runner, _| done(runner.stop())),
    command("cont", NOTHING, NOTHING, |runner, _| done(runner.resume())),
    command("system_powerdown", NOTHING, NOTHING, |runner, _| done(runner.power_down())),
    command("system_reset", NOTHING, NOTHING, |runner, _| {
        runner.reset();
        Ok(json!({}))
    }),
    command("quit", NOTHING, NOTHING, |runner, _| {
        runner.quit("host-qmp-quit");
        Ok(json!({}))
    }),
];

static EVENTS: &[Event] = &[
    Event { name: "SHUTDOWN", data: CAUSE },
    Event { name: "RESET", data: CAUSE },
    Event { name: "STOP", data: &[] },
    Event { name: "RESUME", data: &[] },
    Event { name: "POWERDOWN", data: &[] },
    Event { name: "BLOCK_IO_ERROR", data: FAILURE },
];

const FAILURE: &[Member] = &[
    required("qom-path", Shape::Text),
    required("device", Shape::Text),
    optional("node-name", Shape::Text),
    required("operation", Shape::Choice(&["read", "write"])),
    required("action", Shape::Choice(&["report", "ignore", "stop"])),
    optional("nospace", Shape::Switch),
    required("reason", Shape::Text),
];

const CAUSE: &[Member] = &[
    required("guest", Shape::Switch),
    required(
        "reason",
        Shape::Choice(&[
            "guest-shutdown",
            "guest-reset",
            "guest-panic",
            "host-qmp-quit",
            "host-qmp-system-reset",
            "host-signal",
            "host-ui",
        ]),
    ),
];

const STATUS: Shape = Shape::Object(&[
    required("running", Shape::Switch),
    required("status", Shape::Choice(&["running", "paused", "io-error", "shutdown"])),
]);

const CPU_LIST: Shape = Shape::List(&Shape::Object(&[
    required("cpu-index", Shape::Integer),
    required("qom-path", Shape::Text),
    required("thread-id", Shape::Integer),
    optional("props", Shape::Object(&[optional("core-id", Shape::Integer)])),
    required("target", Shape::Choice(&["x86_64"])),
]));

impl From<Error> for CommandError {
    fn from(error: Error) -> Self {
        Self::new(error.to_string())
    }
}

fn done(result: crate::Result<()>) -> Outcome {
    result?;
    Ok(json!({}))
}

fn query_status(runner: &Runner, _: &Arguments<'_>) -> Outcome {
    let status = runner.status().name();
    Ok(json!({"running": status == "running", "status": status}))
}

fn query_cpus(runner: &Runner, _: &Arguments<'_>) -> Outcome {
    let processors = runner.machine().map(|machine| machine.processors()).unwrap_or_default();
    let entry = |(index, thread): (u32, i32)| -> Value {
        json!({
            "cpu-index": index,
            "qom-path": format!("/machine/cpu[{index}]"),
            "thread-id": thread,
            "props": {"core-id": index},
            "target": "x86_64",
        })
    };
    Ok(processors.into_iter().map(entry).collect())
}
