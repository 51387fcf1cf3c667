package mesh

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"strings"
	"testing"

	"github.com/openai/openai-go/v3"
)

// mediaSite is a gateway whose models hear, speak and paint.
const mediaSite = `http://$ADDRESS {
	mesh {
		store local $DIR/mesh.db
		key ` + testKey + `
		upstream openai http://$UPSTREAM/v1 {
			api_key sk-upstream
		}
		model openai/gpt-4o-audio-preview openai {
			price 2.50 10.00
			price_audio 40.00 80.00
		}
		model openai/gpt-image-1 openai {
			type image
			price 5.00 40.00
		}
		model openai/* openai
	}
}
`

func TestSDKSendsAndReceivesSound(t *testing.T) {
	up := startUpstream(t, plays(t, "speech.json"))
	p := startProcess(t, up.address(), mediaSite)
	client := newSDK(p.url, testKey)
	params := asking("openai/gpt-4o-audio-preview", openai.UserMessage([]openai.ChatCompletionContentPartUnionParam{
		openai.TextContentPart("What is in this recording?"),
		openai.InputAudioContentPart(openai.ChatCompletionContentPartInputAudioInputAudioParam{
			Data: base64.StdEncoding.EncodeToString(bytes.Repeat([]byte{0x00, 0x7f, 0xff}, 5000)), Format: "wav",
		}),
	}))
	params.Modalities = []string{"text", "audio"}
	params.Audio = openai.ChatCompletionAudioParam{
		Format: openai.ChatCompletionAudioParamFormatWAV,
		Voice:  openai.ChatCompletionAudioParamVoiceUnion{OfString: openai.String("alloy")},
	}
	got, err := client.Chat.Completions.New(t.Context(), params)
	if err != nil {
		t.Fatal(err)
	}
	audio := got.Choices[0].Message.Audio
	if sound, err := base64.StdEncoding.DecodeString(audio.Data); err != nil || !bytes.HasPrefix(sound, []byte("RIFF")) || !strings.HasSuffix(audio.Transcript, "barks twice.") {
		t.Errorf("%v, %s", err, got.RawJSON())
	}
	if got.Usage.CompletionTokensDetails.AudioTokens != 50 || got.JSON.ExtraFields["cost"].Raw() != `"0.008275"` {
		t.Errorf("%s", got.RawJSON())
	}
	client.checkUpstream(t, up, "")
}

func TestSDKStreamsSound(t *testing.T) {
	up := startUpstream(t, plays(t, "speech.sse"))
	p := startProcess(t, up.address(), mediaSite)
	client := newSDK(p.url, testKey)
	params := asking("openai/gpt-4o-audio-preview", openai.UserMessage("Are golden retrievers loyal?"))
	params.Modalities = []string{"text", "audio"}
	params.Audio = openai.ChatCompletionAudioParam{
		Format: openai.ChatCompletionAudioParamFormatPcm16,
		Voice:  openai.ChatCompletionAudioParamVoiceUnion{OfString: openai.String("alloy")},
	}
	params.StreamOptions.IncludeUsage = openai.Bool(true)
	acc, chunks, err := drain(client.Chat.Completions.NewStreaming(t.Context(), params))
	if err != nil {
		t.Fatal(err)
	}
	var transcript string
	var sound []byte
	for _, chunk := range chunks {
		if len(chunk.Choices) == 0 {
			continue
		}
		part := chunk.Choices[0].Delta.Audio
		piece, err := base64.StdEncoding.DecodeString(part.Data)
		if err != nil {
			t.Fatal(err)
		}
		transcript += part.Transcript
		sound = append(sound, piece...)
	}
	if transcript != "Yes, they are loyal." || len(sound) != 480 { // 10 ms at 24 kHz
		t.Errorf("%q and %d bytes of sound", transcript, len(sound))
	}
	last := chunks[len(chunks)-1]
	if acc.Choices[0].FinishReason != "stop" || last.Usage.CompletionTokensDetails.AudioTokens != 34 || last.JSON.ExtraFields["cost"].Raw() != `"0.0068275"` {
		t.Errorf("the last frame is %s", last.RawJSON())
	}
	client.checkUpstream(t, up, "")
}

// imagesOf are the URLs of a message's images, for which OpenAI's SDK has no type.
func imagesOf(t *testing.T, raw string) (urls []string) {
	t.Helper()
	var images []struct {
		Type     string
		ImageURL struct{ URL string } `json:"image_url"`
	}
	if err := json.Unmarshal([]byte(raw), &images); err != nil {
		t.Fatalf("%v in %q", err, raw)
	}
	for _, one := range images {
		if one.Type != "image_url" {
			t.Errorf("an image of type %q", one.Type)
		}
		urls = append(urls, one.ImageURL.URL)
	}
	return urls
}

func TestSDKMakesImages(t *testing.T) {
	const png = "data:image/png;base64,"
	up := startUpstream(t, plays(t, "images.json", "images_url.json", "images.json"))
	p := startProcess(t, up.address(), mediaSite)
	client := newSDK(p.url, testKey)

	// a model of that type
	params := asking("openai/gpt-image-1", openai.SystemMessage("You paint."), openai.UserMessage("Two dots, \"red\" & blue"))
	params.User = openai.String("user-1234")
	params.SetExtraFields(map[string]any{"image": map[string]any{"n": 2, "size": "1024x1024", "quality": "low"}})
	whole, err := client.Chat.Completions.New(t.Context(), params)
	if err != nil {
		t.Fatal(err)
	}
	message := whole.Choices[0].Message
	urls := imagesOf(t, message.JSON.ExtraFields["images"].Raw())
	if len(urls) != 2 || urls[0] != png+redDot || urls[1] != png+blueDot || message.Content != "" || whole.Choices[0].FinishReason != "stop" ||
		whole.Usage.TotalTokens != 594 || whole.JSON.ExtraFields["cost"].Raw() != `"0.02201"` {
		t.Errorf("%s", whole.RawJSON())
	}
	sent := up.last(t)
	if want := `{"model":"gpt-image-1","prompt":"Two dots, \"red\" \u0026 blue","n":2,"quality":"low","size":"1024x1024","user":"user-1234"}`; sent.URL.Path != "/v1/images/generations" ||
		string(sent.body) != want && string(sent.body) != strings.ReplaceAll(want, `\u0026`, "&") {
		t.Errorf("%s received %s", sent.URL, sent.body)
	}

	// any other, of the modality
	params = asking("openai/dall-e-3", openai.UserMessage("An otter"))
	params.SetExtraFields(map[string]any{"modality": "image", "image": map[string]any{"response_format": "url"}})
	whole, err = client.Chat.Completions.New(t.Context(), params)
	if err != nil {
		t.Fatal(err)
	}
	message = whole.Choices[0].Message
	if urls := imagesOf(t, message.JSON.ExtraFields["images"].Raw()); len(urls) != 1 || !strings.HasPrefix(urls[0], "https://images.example.com/") ||
		!strings.HasPrefix(message.Content, "A small otter") {
		t.Errorf("%s", whole.RawJSON())
	}

	// and as a stream
	params = asking("openai/gpt-image-1", openai.UserMessage("Two dots"))
	params.StreamOptions.IncludeUsage = openai.Bool(true)
	acc, chunks, err := drain(client.Chat.Completions.NewStreaming(t.Context(), params))
	if err != nil {
		t.Fatal(err)
	}
	if urls := imagesOf(t, chunks[0].Choices[0].Delta.JSON.ExtraFields["images"].Raw()); len(urls) != 2 || urls[1] != png+blueDot {
		t.Errorf("%s", chunks[0].RawJSON())
	}
	if acc.Choices[0].FinishReason != "stop" || acc.Usage.TotalTokens != 594 || len(chunks) != 3 {
		t.Errorf("%d chunks: %+v", len(chunks), acc.Choices)
	}
}

// TestSDKMakesImagesWithTheDemoModel has no upstream but the model that comes with cmd/caddy.
func TestSDKMakesImagesWithTheDemoModel(t *testing.T) {
	p := startProcess(t, "", demoSite)
	params := asking("demo/painter", openai.UserMessage("An otter"))
	params.SetExtraFields(map[string]any{"modality": "image", "image": map[string]any{"n": 3}})
	client := newSDK(p.url, testKey)
	got, err := client.Chat.Completions.New(t.Context(), params)
	if err != nil {
		t.Fatal(err)
	}
	if urls := imagesOf(t, got.Choices[0].Message.JSON.ExtraFields["images"].Raw()); len(urls) != 3 || got.Usage.TotalTokens != 2+3*64 {
		t.Errorf("%s", got.RawJSON())
	}
}
