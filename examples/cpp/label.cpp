// Label a picture by a network of `cen export --format aot`, without Python. README.md says how it is built.

#include <ATen/ATen.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

using Words = std::vector<std::string>;

void check(bool holds, const std::string& message) {
  if (!holds) throw std::runtime_error(message);
}

// What stands behind a key's first place after `from`, in JSON as Python writes it: a list's words, or one.
Words words(const std::string& json, const std::string& key, size_t from = 0) {
  size_t at = json.find("\"" + key + "\": ", from);
  check(at != std::string::npos, "the package's metadata lacks " + key);
  at += key.size() + 4;
  const bool list = json.at(at) == '[';
  bool quoted = false;
  Words found;
  for (std::string word;; ++at) {
    const char c = json.at(at);
    if (c == '"' && json[at - 1] != '\\') {
      quoted = !quoted;
    } else if (quoted || std::string("[], }").find(c) == std::string::npos) {
      word += c;
    } else if (c == ',' || c == ']' || c == '}') {
      if (!word.empty()) found.push_back(word);
      word.clear();
      if (!list || c == ']') return found;
    }
  }
}

// Pixels [C, H, W], as stored, of a PPM (kind P6, 8 bits) or a PGM (P5, 8 or 16 bits) of the size H, W.
at::Tensor read_image(const std::string& path, const std::string& kind, const Words& size) {
  std::ifstream file(path, std::ios::binary);
  check(file.good(), path + ": cannot be read");
  std::string found, comment;
  int64_t width = 0, height = 0, largest = 0;
  file >> found;
  check(found == kind, path + ": expected an image of kind " + kind);
  for (int64_t* number : {&width, &height, &largest}) {
    while ((file >> std::ws).peek() == '#') std::getline(file, comment);
    file >> *number;
  }
  file.get();
  check(file && largest > 0 && (kind == "P6" ? largest == 255 : largest < 65536), path + ": unknown header");
  check(Words{std::to_string(height), std::to_string(width)} == size,
        path + ": " + std::to_string(width) + "x" + std::to_string(height) + " pixels, the network is for " +
            size[1] + "x" + size[0]);
  const int64_t channels = kind == "P6" ? 3 : 1, bytes = largest > 255 ? 2 : 1;
  at::Tensor stored = at::empty({height, width, channels, bytes}, at::kByte);
  file.read(static_cast<char*>(stored.data_ptr()), stored.numel());
  check(file.gcount() == stored.numel(), path + ": ends before its last pixel");
  at::Tensor pixels = stored.select(3, 0).to(at::kFloat);
  if (bytes == 2) pixels = 256 * pixels + stored.select(3, 1);
  return pixels.permute({2, 0, 1});
}

// What the network takes of an image [C, H, W] in the modality's unit: normalized, [1, 3, H, W].
at::Tensor input(const at::Tensor& image, const std::string& json, const std::string& modality) {
  const size_t place = json.find("{\"name\": \"" + modality + "\"", json.find("\"inputs\": "));
  const std::string unit = modality == "rgb" ? "full brightness" : "metre";
  check(words(json, "unit", place)[0] == unit,
        modality + ": expected a network that takes it by the " + unit);
  const Words mean = words(json, "mean", place), deviation = words(json, "std", place);
  at::Tensor x = image.clone();
  for (size_t c = 0; c < mean.size(); ++c) x[c].sub_(std::stof(mean[c])).div_(std::stof(deviation[c]));
  return x.expand({3, -1, -1}).unsqueeze(0).contiguous();  // The network does not look at strides.
}

void label(const Words& arguments) {
  torch::inductor::AOTIModelPackageLoader network(arguments[0]);
  const std::string json = network.get_metadata()["cen_ext.json"];
  check(words(json, "modalities") == Words{"rgb", "depth"}, arguments[0] + ": is not for rgb and depth");
  check(words(json, "outputs")[0] != "branches", arguments[0] + ": export it with --outputs ensemble");
  const Words size = words(json, "size"), classes = words(json, "classes");
  const std::string stored = words(json, "bit_shift")[0] == "0" ? words(json, "depth_scale")[0] : "null";
  const std::string scale = arguments.size() > 4 ? arguments[4] : stored;
  check(std::atof(scale.c_str()) > 0, "DEPTH-UNITS-PER-METER: expected a number above 0, got " + scale);
  const at::Tensor color = read_image(arguments[1], "P6", size);
  const at::Tensor depth = read_image(arguments[2], "P5", size);
  std::vector<at::Tensor> inputs = {input(color / 255, json, "rgb"),
                                    input(depth / std::stof(scale), json, "depth")};
  if (words(json, "form")[0] == "stacked") inputs = {at::cat(inputs)};
  network.run(inputs);  // The first run allocates what the second one finds.
  const auto start = std::chrono::steady_clock::now();
  const at::Tensor logits = network.run(inputs)[0];
  const std::chrono::duration<double, std::milli> elapsed = std::chrono::steady_clock::now() - start;
  const at::Tensor enlarged = at::upsample_bilinear2d(logits, color.sizes().slice(1), false);
  const at::Tensor labels = enlarged.argmax(1).to(at::kByte).contiguous();
  std::ofstream file(arguments[3], std::ios::binary);
  file << "P5\n" << size[1] << " " << size[0] << "\n255\n";
  file.write(static_cast<const char*>(labels.data_ptr()), labels.numel());
  check(file.flush().good(), arguments[3] + ": cannot be written");
  for (size_t k = 0; k < classes.size(); ++k)
    if (const double share = labels.eq(int64_t(k)).to(at::kDouble).mean().item<double>(); share > 0)
      std::printf("%5.1f %%  %s\n", 100 * share, classes[k].c_str());
  std::printf("%.1f ms\n", elapsed.count());
}

int main(int count, char** arguments) try {
  check(count == 5 || count == 6,
        "usage: label NET.pt2 RGB.ppm DEPTH.pgm LABELS.pgm [DEPTH-UNITS-PER-METER]");
  c10::InferenceMode mode;
  label(Words(arguments + 1, arguments + count));
} catch (const std::exception& error) {
  const std::string message = error.what();  // c10's has a backtrace from the second line on.
  std::fprintf(stderr, "error: %s\n", message.substr(0, message.find('\n')).c_str());
  return 1;
}
