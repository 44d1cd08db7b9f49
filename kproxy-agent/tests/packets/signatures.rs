//! The signatures that BTF gives the functions of the objects. Since Linux 7 the verifier takes the parameters of a
//! called function from there, also those without a size, and finds no registers for more than five.

use std::collections::BTreeMap;

use aya_obj::Object;
use kproxy::programs::OBJECT;

/// R1 to R5.
const PARAMETERS_AT_MOST: usize = 5;

#[test]
fn no_function_has_more_parameters_than_there_are_registers() {
    check("kproxy.bpf.o", OBJECT);
    match std::env::var_os("KPROXY_TEST_OBJECT") {
        Some(path) => {
            check("kproxy-test.bpf.o", &std::fs::read(path).expect("the test object can be read"));
        }
        None => println!("the object for tests is left out: KPROXY_TEST_OBJECT does not name it"),
    }
}

fn check(name: &str, bytes: &[u8]) {
    let object = Object::parse(bytes).expect("the object can be read");
    let btf = object.btf.as_ref().expect("the object has BTF");
    let signatures = Signatures::read(&btf.to_bytes());
    let mut counted = 0;
    let mut too_many = Vec::new();
    for function in object.functions.values() {
        // Each has a record that says which type it is of; without one the verifier refuses it.
        let record = function.func_info.func_info.first();
        let record = record.unwrap_or_else(|| panic!("{name}: no type for {}", function.name));
        let (signature, parameters) = signatures
            .of_function(record.type_id)
            .unwrap_or_else(|| panic!("{name}: the type of {} is no function's", function.name));
        counted += 1;
        if parameters > PARAMETERS_AT_MOST {
            too_many.push(format!("{signature} has {parameters}"));
        }
    }
    assert!(too_many.is_empty(), "{name}: Linux 7 refuses functions with so many parameters: {too_many:?}");
    // What was looked for is there to be found: programs, and functions that they call.
    let called = counted - object.programs.len();
    assert!(
        !object.programs.is_empty() && called > 0,
        "{name}: {counted} functions, {called} of them called"
    );
    println!("{name}: {counted} functions, {called} of them called");
}

/// What BTF says of functions. See `Documentation/bpf/btf.rst` of the kernel.
struct Signatures {
    /// By type: the function's name, and the type of its prototype.
    functions: BTreeMap<u32, (String, u32)>,
    /// By type: how many parameters a prototype has.
    prototypes: BTreeMap<u32, usize>,
}

impl Signatures {
    fn read(btf: &[u8]) -> Self {
        let u32_at = |at: usize| u32::from_le_bytes(btf[at..at + 4].try_into().expect("four octets"));
        assert_eq!(btf[..2], [0x9f, 0xeb], "BTF of the least significant octet first");
        let header = u32_at(4) as usize;
        let (types, types_length) = (header + u32_at(8) as usize, u32_at(12) as usize);
        let strings = header + u32_at(16) as usize;
        let string = |offset: u32| {
            let rest = &btf[strings + offset as usize..];
            let end = rest.iter().position(|octet| *octet == 0).expect("strings end in a zero");
            String::from_utf8_lossy(&rest[..end]).into_owned()
        };
        let (mut functions, mut prototypes) = (BTreeMap::new(), BTreeMap::new());
        let (mut at, mut id) = (types, 1);
        while at < types + types_length {
            let (name, info, of) = (u32_at(at), u32_at(at + 4), u32_at(at + 8));
            let (kind, members) = (info >> 24 & 0x1f, (info & 0xffff) as usize);
            let tail = match kind {
                FUNC_PROTO => {
                    prototypes.insert(id, members);
                    8 * members
                }
                FUNC => {
                    functions.insert(id, (string(name), of));
                    0
                }
                INT | VAR | DECL_TAG => 4,
                ARRAY => 12,
                STRUCT | UNION | DATASEC | ENUM64 => 12 * members,
                ENUM => 8 * members,
                _ => 0,
            };
            at += 12 + tail;
            id += 1;
        }
        assert_eq!(at, types + types_length, "the last type ends where the types do");
        Self { functions, prototypes }
    }

    /// The name of this function type, and how many parameters it has.
    fn of_function(&self, id: u32) -> Option<(&str, usize)> {
        let (name, prototype) = self.functions.get(&id)?;
        Some((name, *self.prototypes.get(prototype)?))
    }
}

const INT: u32 = 1;
const ARRAY: u32 = 3;
const STRUCT: u32 = 4;
const UNION: u32 = 5;
const ENUM: u32 = 6;
const FUNC: u32 = 12;
const FUNC_PROTO: u32 = 13;
const VAR: u32 = 14;
const DATASEC: u32 = 15;
const DECL_TAG: u32 = 17;
const ENUM64: u32 = 19;
