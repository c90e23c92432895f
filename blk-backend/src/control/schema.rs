//! `query-qmp-schema`: the table of commands and events as QEMU tells it (`qapi/introspect.json`).

use std::collections::HashSet;

use serde_json::{Value, json};

use super::{
    service::Service,
    shape::{Member, Shape, Union},
};

/// All commands, events and the types that they use.
pub(super) fn schema<S: Service>() -> Value {
    let mut types = Types::default();
    let mut entries = Vec::new();
    for command in S::COMMANDS.iter().copied().flatten() {
        let (arguments, returns) = (types.name(command.arguments), types.name(command.returns));
        let mut entry =
            json!({"name": command.name, "meta-type": "command", "arg-type": arguments, "ret-type": returns});
        if command.deprecated {
            entry["features"] = json!(["deprecated"]);
        }
        entries.push(entry);
    }
    for event in S::EVENTS {
        let data = types.name(Shape::Object(event.data));
        entries.push(json!({"name": event.name, "meta-type": "event", "arg-type": data}));
    }
    entries.append(&mut types.entries);
    Value::Array(entries)
}

/// The types met so far, each told once.
#[derive(Default)]
struct Types {
    entries: Vec<Value>,
    told: HashSet<String>,
    /// Shapes of objects and enumerations, by content; the index is the name.
    numbered: Vec<String>,
}

impl Types {
    /// The name of a type, which is told when it is new.
    fn name(&mut self, shape: Shape) -> String {
        match shape {
            Shape::Text => self.builtin("str", "string"),
            Shape::Integer => self.builtin("int", "int"),
            Shape::Switch => self.builtin("bool", "boolean"),
            Shape::Any => self.builtin("any", "value"),
            Shape::List(of) => {
                let of = self.name(*of);
                let name = format!("[{of}]");
                if self.told.insert(name.clone()) {
                    self.entries.push(json!({"name": name, "meta-type": "array", "element-type": of}));
                }
                name
            }
            Shape::Choice(words) => self.numbered(shape, |_, name| {
                let members: Vec<Value> = words.iter().map(|word| json!({"name": word})).collect();
                json!({"name": name, "meta-type": "enum", "members": members, "values": words})
            }),
            Shape::Object(members) => self.numbered(
                shape,
                |types, name| json!({"name": name, "meta-type": "object", "members": types.members(members)}),
            ),
            Shape::Union(Union { members, tag, cases }) => self.numbered(shape, |types, name| {
                let mut variants = Vec::new();
                for (case, members) in *cases {
                    variants.push(json!({"case": case, "type": types.name(Shape::Object(members))}));
                }
                json!({
                    "name": name, "meta-type": "object", "members": types.members(members), "tag": tag,
                    "variants": variants,
                })
            }),
        }
    }

    fn members(&mut self, members: &[Member]) -> Vec<Value> {
        let entry = |member: &Member| {
            let mut entry = json!({"name": member.name, "type": self.name(member.shape)});
            if !member.required {
                entry["default"] = Value::Null;
            }
            entry
        };
        members.iter().map(entry).collect()
    }

    fn builtin(&mut self, name: &str, json_type: &str) -> String {
        if self.told.insert(name.to_owned()) {
            self.entries.push(json!({"name": name, "meta-type": "builtin", "json-type": json_type}));
        }
        name.to_owned()
    }

    fn numbered(&mut self, shape: Shape, tell: impl FnOnce(&mut Self, &str) -> Value) -> String {
        let content = format!("{shape:?}");
        if let Some(known) = self.numbered.iter().position(|known| *known == content) {
            return known.to_string();
        }
        self.numbered.push(content);
        let name = (self.numbered.len() - 1).to_string();
        let entry = tell(self, &name);
        self.entries.push(entry);
        name
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::Daemon;

    /// Every type that is named is told, once, and every command and event is there.
    #[test]
    fn the_schema_is_closed() {
        let schema = schema::<Daemon>();
        let entries = schema.as_array().unwrap();
        let names: Vec<&str> = entries.iter().map(|entry| entry["name"].as_str().unwrap()).collect();
        assert_eq!(names.iter().collect::<HashSet<_>>().len(), names.len(), "a name is told twice");
        let mut used: Vec<&Value> = Vec::new();
        for entry in entries {
            used.extend(["arg-type", "ret-type", "element-type"].iter().filter_map(|key| entry.get(key)));
            for list in ["members", "variants"] {
                let members = entry.get(list).and_then(Value::as_array).into_iter().flatten();
                used.extend(members.filter_map(|member| member.get("type")));
            }
        }
        assert!(used.len() > 50);
        for name in used {
            assert!(names.contains(&name.as_str().unwrap()), "{name} is not told");
        }
        for command in Daemon::COMMANDS.iter().copied().flatten() {
            assert!(names.contains(&command.name));
        }
    }
}
